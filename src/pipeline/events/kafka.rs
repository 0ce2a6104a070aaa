//! A Kafka topic as a sink: a record for each event, whose key is the order's id and whose value is the event.

use std::sync::Arc;

use super::{Delivering, Delivery, Event, Sink};
use crate::queue::log::broker::SendError;
use crate::queue::log::broker::kafka::{KafkaSettings, KeyedRecord, Producer};

/// A topic.
#[derive(Debug)]
pub struct KafkaTopic {
    producer: Arc<Producer>,
    topic: String,
}

impl KafkaTopic {
    /// A topic that is connected to when it is needed.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn new(settings: KafkaSettings) -> Result<Self, String> {
        let topic = settings.topic.clone();
        let producer = Producer::new(settings).map_err(|error| error.to_string())?;
        Ok(KafkaTopic {
            producer: Arc::new(producer),
            topic,
        })
    }
}

impl Sink for KafkaTopic {
    fn title(&self) -> String {
        format!("Kafka topic {}", self.topic)
    }

    fn deliver<'a>(&'a self, events: &'a [Event]) -> Delivering<'a> {
        Box::pin(async move {
            let records: Vec<KeyedRecord> = events
                .iter()
                .map(|event| KeyedRecord {
                    key: event.subject.clone(),
                    value: event.body.clone(),
                    traceparent: event.traceparent.clone(),
                })
                .collect();
            let producer = Arc::clone(&self.producer);
            let sent = tokio::task::spawn_blocking(move || producer.send(&records)).await;
            match sent {
                Ok(outcomes) => outcomes.into_iter().map(outcome).collect(),
                Err(panic) => {
                    let reason = panic.to_string();
                    events
                        .iter()
                        .map(|_| Delivery::Failed(reason.clone()))
                        .collect()
                }
            }
        })
    }
}

/// Whatever the reason, a record is sent again: a topic without rights or room is mended by a person.
fn outcome(sent: Result<(), SendError>) -> Delivery {
    match sent {
        Ok(()) => Delivery::Delivered,
        Err(error) => Delivery::Failed(error.to_string()),
    }
}
