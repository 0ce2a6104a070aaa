//! Declaration and registration of a table of metrics.

use std::collections::BTreeMap;
use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Declares a struct of metrics. A row has the field, the kind (a method of [`Registrar`]), the
/// metric's name, further arguments of the kind, and the meaning: the metric's help and the field's
/// doc.
macro_rules! metrics {
    (
        $(#[$doc:meta])*
        pub struct $table:ident {
            $($field:ident = $kind:ident($name:tt $(, $more:expr)*): $help:literal;)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $table {
            $(#[doc = $help] pub $field: metrics!(@type $kind $name),)*
        }

        impl $table {
            pub(in crate::metrics) fn register(registrar: &mut $crate::metrics::table::Registrar) -> prometheus::Result<Self> {
                Ok($table {
                    $($field: metrics!(@register registrar $kind $name, $help $(, $more)*),)*
                })
            }
        }
    };
    (@register $registrar:ident group $table:ident, $help:literal) => { $table::register($registrar)? };
    (@register $registrar:ident $kind:ident $name:tt, $help:literal $(, $more:expr)*) => {
        $registrar.$kind($name, $help $(, $more)*)?
    };
    (@type group $table:ident) => { $table };
    (@type counter $name:tt) => { prometheus::IntCounter };
    (@type counters $name:tt) => { $crate::metrics::Counters };
    (@type labelled_counter $name:tt) => { prometheus::IntCounterVec };
    (@type gauge $name:tt) => { prometheus::IntGauge };
    (@type gauges $name:tt) => { prometheus::IntGaugeVec };
    (@type float_gauge $name:tt) => { prometheus::Gauge };
    (@type histogram $name:tt) => { prometheus::Histogram };
}

/// Counters by the value of a label.
pub type Totals = BTreeMap<&'static str, u64>;

/// One counter per value of a label. All exist from the start, so that a rate begins at zero. They
/// are looked up once, because a look-up by label costs a lock and a hash on every request.
#[derive(Clone, Debug)]
pub struct Counters {
    by_value: Arc<[(&'static str, IntCounter)]>,
}

impl Counters {
    /// Adds one. A value that is not in the list counts as the last, which is `other`.
    pub fn count(&self, value: &str) {
        if let Some(counter) = self.of(value) {
            counter.inc();
        }
    }

    /// Adds several; as [`Counters::count`].
    pub fn add(&self, value: &str, more: u64) {
        if let Some(counter) = self.of(value) {
            counter.inc_by(more);
        }
    }

    /// Raises a counter to a total that is counted elsewhere.
    pub fn catch_up(&self, value: &str, counted: u64) {
        if let Some(counter) = self.of(value) {
            counter.inc_by(counted.saturating_sub(counter.get()));
        }
    }

    /// The counts so far.
    pub fn totals(&self) -> Totals {
        let counters = self.by_value.iter();
        counters.map(|(value, n)| (*value, n.get())).collect()
    }

    fn of(&self, value: &str) -> Option<&IntCounter> {
        let found = self.by_value.iter().find(|(known, _)| *known == value);
        found.or(self.by_value.last()).map(|(_, counter)| counter)
    }
}

/// One metric on the reference page.
#[derive(Clone, Debug)]
pub(super) struct Described {
    pub(super) name: String,
    pub(super) kind: &'static str,
    /// Labels, with their values if these are fixed.
    pub(super) labels: String,
    pub(super) help: String,
}

/// Registers metrics and collects their descriptions.
#[derive(Default)]
pub(super) struct Registrar {
    pub(super) registry: Registry,
    pub(super) described: Vec<Described>,
}

impl Registrar {
    fn add<M: Collector + Clone + 'static>(
        &mut self,
        metric: M,
        kind: &'static str,
        labels: String,
    ) -> prometheus::Result<M> {
        for desc in metric.desc() {
            self.described.push(Described {
                name: desc.fq_name.clone(),
                kind,
                labels: labels.clone(),
                help: desc.help.clone(),
            });
        }
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    pub(super) fn counter(&mut self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help)?, "counter", String::new())
    }

    pub(super) fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&'static str],
    ) -> prometheus::Result<Counters> {
        let listed = values.iter().map(|value| format!("`{value}`"));
        let listed = listed.collect::<Vec<_>>().join(", ");
        let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
        let metric = self.add(metric, "counter", format!("`{label}`: {listed}"))?;
        let by_value = values
            .iter()
            .map(|value| (*value, metric.with_label_values(&[value])));
        Ok(Counters {
            by_value: by_value.collect(),
        })
    }

    pub(super) fn labelled_counter(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        described: &str,
    ) -> prometheus::Result<IntCounterVec> {
        let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
        self.add(metric, "counter", described.to_owned())
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help)?, "gauge", String::new())
    }

    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> prometheus::Result<Histogram> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(options)?, "histogram", String::new())
    }

    pub(super) fn float_gauge(&mut self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.add(Gauge::new(name, help)?, "gauge", String::new())
    }

    pub(super) fn gauges(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        described: &str,
    ) -> prometheus::Result<IntGaugeVec> {
        let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
        self.add(metric, "gauge", described.to_owned())
    }
}
