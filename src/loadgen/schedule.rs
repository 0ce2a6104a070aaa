//! The deterministic sequence of arrivals, walked by a cursor instead of being laid out in memory.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::arrival::Arrival;
use super::plan::LoadPlan;
use super::rate::Curve;
use super::request_template::RequestTemplate;

/// Salts that keep the draws for one arrival independent of each other.
const SALT_BUYER: u64 = 0x6275_7965_7200_0001;
const SALT_SKU: u64 = 0x736b_7500_0000_0002;
const SALT_DOUBLE: u64 = 0x646f_7562_6c65_0003;
const SALT_PAUSE: u64 = 0x7061_7573_6500_0004;

/// Decides every arrival as a pure function of its number.
#[derive(Debug)]
pub(super) struct Schedule {
    curve: Curve,
    end_s: f64,
    requests_max: u64,
    fresh_max: u64,
    double_share: f64,
    double_ns_max: u64,
    buyers: u32,
    one_order_per_buyer: bool,
    replay: Option<Vec<u16>>,
    /// Running sums of the SKUs' shares, the last being the total.
    shares: Vec<f64>,
    seed: u64,
}

impl Schedule {
    /// The schedule of a plan that passed its check.
    pub(super) fn new(plan: &LoadPlan, template: &RequestTemplate) -> Self {
        let end_s = plan
            .duration_ms
            .map_or(f64::INFINITY, |ms| ms as f64 / 1000.0);
        let replay: Option<Vec<u16>> = template
            .lines()
            .map(|lines| lines.iter().map(|line| line.sku).collect());
        let mut total = 0.0;
        Self {
            curve: plan.rate.curve(end_s),
            end_s,
            requests_max: plan.requests_max.unwrap_or(u64::MAX),
            fresh_max: replay.as_ref().map_or(u64::MAX, |lines| lines.len() as u64),
            double_share: plan.double_click_share,
            double_ns_max: plan.double_click_ms_max.saturating_mul(1_000_000),
            buyers: plan.buyers,
            one_order_per_buyer: plan.one_order_per_buyer,
            replay,
            shares: plan
                .skus
                .iter()
                .map(|sku| {
                    total += sku.weight;
                    total
                })
                .collect(),
            seed: mix(plan.seed),
        }
    }

    /// About how many requests will fall due.
    pub(super) fn requests_expected(&self) -> u64 {
        let by_time = if self.end_s.is_finite() {
            self.curve.due_before(self.end_s)
        } else {
            f64::MAX
        };
        let by_file = self.fresh_max as f64 * (1.0 + self.double_share);
        by_time.min(by_file).min(self.requests_max as f64) as u64
    }

    /// About how long requests will fall due, in seconds.
    pub(super) fn seconds_expected(&self) -> f64 {
        self.curve
            .moment_s(self.requests_expected() as f64)
            .min(self.end_s)
    }

    /// Fresh arrival number `n`, and the pause before its second click if it is a double click.
    fn fresh(&self, n: u64) -> Option<(Arrival, Option<u64>)> {
        if n >= self.fresh_max {
            return None;
        }
        // The rate counts second clicks, so fresh arrivals come that much further apart.
        let due_s = self.curve.moment_s(n as f64 * (1.0 + self.double_share));
        if due_s >= self.end_s || !due_s.is_finite() {
            return None;
        }
        let (buyer, sku) = match &self.replay {
            Some(lines) => (n as u32, lines.get(n as usize).copied().unwrap_or(0)),
            None if self.one_order_per_buyer => {
                let buyer = if n < u64::from(self.buyers) {
                    n as u32
                } else {
                    self.buyer(n)
                };
                // Drawn from the buyer, so that a later arrival of the same buyer repeats the order.
                (buyer, self.sku(u64::from(buyer)))
            }
            None => (self.buyer(n), self.sku(n)),
        };
        let arrival = Arrival {
            scheduled_ns: (due_s * 1e9) as u64,
            buyer,
            sku,
            double: false,
        };
        let again = (fraction(self.draw(SALT_DOUBLE, n)) < self.double_share)
            .then(|| self.draw(SALT_PAUSE, n) % (self.double_ns_max + 1));
        Some((arrival, again))
    }

    fn draw(&self, salt: u64, n: u64) -> u64 {
        mix(self.seed ^ mix(salt ^ n))
    }

    fn buyer(&self, n: u64) -> u32 {
        (self.draw(SALT_BUYER, n) % u64::from(self.buyers)) as u32
    }

    fn sku(&self, n: u64) -> u16 {
        let total = self.shares.last().copied().unwrap_or(0.0);
        let point = fraction(self.draw(SALT_SKU, n)) * total;
        let place = self.shares.partition_point(|&sum| sum <= point);
        place.min(self.shares.len().saturating_sub(1)) as u16
    }
}

/// A place in the schedule. Arrivals that are due but not yet taken stay here as arithmetic; only second
/// clicks that are not due yet (50 ms of them) are held in memory.
#[derive(Debug)]
pub(super) struct Cursor {
    schedule: Arc<Schedule>,
    next_fresh: u64,
    /// The next fresh arrival, looked at but not handed out.
    peeked: Option<(Arrival, Option<u64>)>,
    /// Second clicks to come: when, after which fresh arrival, buyer and SKU.
    seconds: BinaryHeap<Reverse<(u64, u64, u32, u16)>>,
    walked: u64,
    part: u64,
    parts: u64,
    ahead: Option<Arrival>,
}

impl Cursor {
    /// A cursor over every `parts`-th arrival from number `part`: one thread's share.
    pub(super) fn new(schedule: Arc<Schedule>, part: usize, parts: usize) -> Self {
        let mut cursor = Self {
            peeked: schedule.fresh(0),
            schedule,
            next_fresh: 0,
            seconds: BinaryHeap::new(),
            walked: 0,
            part: part as u64,
            parts: parts.max(1) as u64,
            ahead: None,
        };
        cursor.ahead = cursor.walk_to_own();
        cursor
    }

    /// When the next arrival is due; none at the end of the schedule.
    pub(super) fn due_ns(&self) -> Option<u64> {
        self.ahead.map(|arrival| arrival.scheduled_ns)
    }

    /// Takes the next arrival.
    pub(super) fn take(&mut self) -> Option<Arrival> {
        let arrival = self.ahead.take();
        self.ahead = self.walk_to_own();
        arrival
    }

    /// Takes the next arrival if it is due.
    pub(super) fn take_due(&mut self, now_ns: u64) -> Option<Arrival> {
        if self.due_ns()? <= now_ns {
            self.take()
        } else {
            None
        }
    }

    /// Drops the rest of the schedule.
    pub(super) fn end(&mut self) {
        self.ahead = None;
        self.peeked = None;
        self.seconds.clear();
    }

    fn walk_to_own(&mut self) -> Option<Arrival> {
        loop {
            let number = self.walked;
            let arrival = self.walk()?;
            if number % self.parts == self.part {
                return Some(arrival);
            }
        }
    }

    fn walk(&mut self) -> Option<Arrival> {
        if self.walked >= self.schedule.requests_max {
            return None;
        }
        let second_due = self.seconds.peek().map(|Reverse((due, ..))| *due);
        let fresh_due = self
            .peeked
            .as_ref()
            .map(|(arrival, _)| arrival.scheduled_ns);
        let second_first = match (second_due, fresh_due) {
            (None, None) => return None,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(second), Some(fresh)) => second < fresh,
        };
        let arrival = if second_first {
            let Reverse((scheduled_ns, _, buyer, sku)) = self.seconds.pop()?;
            Arrival {
                scheduled_ns,
                buyer,
                sku,
                double: true,
            }
        } else {
            let (arrival, again) = self.peeked.take()?;
            if let Some(pause_ns) = again {
                self.seconds.push(Reverse((
                    arrival.scheduled_ns.saturating_add(pause_ns),
                    self.next_fresh,
                    arrival.buyer,
                    arrival.sku,
                )));
            }
            self.next_fresh += 1;
            self.peeked = self.schedule.fresh(self.next_fresh);
            arrival
        };
        self.walked += 1;
        Some(arrival)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): a bijection that scrambles well, and the same on every
/// machine and release, which a library's default generator does not promise.
pub(super) fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The upper 53 bits as a number from 0 to below 1.
pub(super) fn fraction(n: u64) -> f64 {
    (n >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn arrivals(plan: &LoadPlan) -> Vec<Arrival> {
        parts(plan, 0, 1)
    }

    fn parts(plan: &LoadPlan, part: usize, parts: usize) -> Vec<Arrival> {
        plan.check().unwrap();
        let schedule = Arc::new(Schedule::new(plan, &RequestTemplate::made_up(plan)));
        let mut cursor = Cursor::new(schedule, part, parts);
        std::iter::from_fn(|| cursor.take()).collect()
    }

    fn plan() -> LoadPlan {
        LoadPlan {
            rate: "step:20000".parse().unwrap(),
            duration_ms: Some(3000),
            buyers: 20_000,
            double_click_share: 0.3,
            ..LoadPlan::new("http://127.0.0.1:1")
        }
        .with_sku("HOT", 90.0)
        .with_sku("COLD", 10.0)
    }

    #[test]
    fn the_same_seed_gives_the_same_clicks_and_another_seed_others() {
        let first = arrivals(&plan());
        assert_eq!(first, arrivals(&plan()));
        assert_ne!(first, arrivals(&LoadPlan { seed: 2, ..plan() }));
    }

    #[test]
    fn clicks_fall_due_in_order_at_the_rate_of_the_plan() {
        let arrivals = arrivals(&plan());
        assert!(
            arrivals
                .windows(2)
                .all(|w| w[0].scheduled_ns <= w[1].scheduled_ns)
        );
        // Half a second of rise is worth a quarter of a second at the peak.
        let expected = 20_000.0 * 2.75;
        assert!(
            (arrivals.len() as f64 / expected - 1.0).abs() < 0.02,
            "{}",
            arrivals.len()
        );
        let mid = arrivals
            .iter()
            .filter(|c| (1_000_000_000..2_000_000_000).contains(&c.scheduled_ns))
            .count();
        assert!((19_500..20_500).contains(&mid), "{mid}");
    }

    #[test]
    fn shares_of_skus_and_double_clicks_are_those_of_the_plan() {
        let arrivals = arrivals(&plan());
        let all = arrivals.len() as f64;
        let hot = arrivals.iter().filter(|c| c.sku == 0).count() as f64;
        assert!((hot / all - 0.9).abs() < 0.01, "{}", hot / all);
        let double = arrivals.iter().filter(|c| c.double).count() as f64;
        assert!((double / (all - double) - 0.3).abs() < 0.01);
    }

    #[test]
    fn a_double_click_repeats_its_first_within_the_pause() {
        let mut last: HashMap<(u32, u16), u64> = HashMap::new();
        for arrival in arrivals(&plan()) {
            if arrival.double {
                let first = last[&(arrival.buyer, arrival.sku)];
                assert!(arrival.scheduled_ns - first <= 50_000_000);
            } else {
                last.insert((arrival.buyer, arrival.sku), arrival.scheduled_ns);
            }
        }
    }

    #[test]
    fn one_order_a_buyer_goes_through_all_buyers_first_and_then_only_repeats() {
        let plan = LoadPlan {
            one_order_per_buyer: true,
            buyers: 5000,
            ..plan()
        };
        let mut skus: HashMap<u32, u16> = HashMap::new();
        for (n, arrival) in arrivals(&plan).iter().filter(|c| !c.double).enumerate() {
            if n < 5000 {
                assert_eq!(arrival.buyer, n as u32);
            }
            assert_eq!(
                *skus.entry(arrival.buyer).or_insert(arrival.sku),
                arrival.sku
            );
        }
        assert_eq!(skus.len(), 5000);
    }

    #[test]
    fn threads_share_the_clicks_without_loss_or_overlap() {
        let mut joined: Vec<Arrival> = (0..3).flat_map(|part| parts(&plan(), part, 3)).collect();
        let mut whole = arrivals(&plan());
        let order = |c: &Arrival| (c.scheduled_ns, c.buyer, c.sku, c.double);
        joined.sort_by_key(order);
        whole.sort_by_key(order);
        assert_eq!(joined, whole);
    }

    #[test]
    fn a_number_of_requests_ends_the_schedule_to_the_request() {
        let plan = LoadPlan {
            duration_ms: None,
            requests_max: Some(12_345),
            ..plan()
        };
        assert_eq!(arrivals(&plan).len(), 12_345);
    }

    #[test]
    fn keys_are_one_for_each_buyer_and_sku() {
        let plan = plan();
        let template = RequestTemplate::made_up(&plan);
        let mut pairs = HashSet::new();
        let mut keys = HashSet::new();
        for arrival in arrivals(&plan) {
            pairs.insert((arrival.buyer, arrival.sku));
            keys.insert(template.key(arrival.buyer, arrival.sku).unwrap());
        }
        assert_eq!(pairs.len(), keys.len());
        assert_eq!(template.user(123), "u-000123");
        assert_eq!(template.key(123, 0).unwrap(), "k-000123-HOT");
    }
}
