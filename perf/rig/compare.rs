//! Comparisons that mean something on a machine that others use too: both sides in one run, in
//! turns, and only the ratio of neighbours counts.

use serde::Serialize;

/// The middle of some values, and how far they lie apart.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The greatest.
    pub greatest: f64,
}

impl Spread {
    /// Of one or more values.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let middle = sorted.len() / 2;
        Spread {
            median: if sorted.len() % 2 == 1 {
                at(middle)
            } else {
                (at(middle.wrapping_sub(1)) + at(middle)) / 2.0
            },
            least: at(0),
            greatest: at(sorted.len().wrapping_sub(1)),
        }
    }
}

impl Spread {
    /// Each of them so many times.
    pub fn times(self, factor: f64) -> Self {
        Spread {
            median: self.median * factor,
            least: self.least * factor,
            greatest: self.greatest * factor,
        }
    }
}

/// The rates of several sides, round by round.
#[derive(Debug)]
pub struct Rounds<const N: usize> {
    rounds: Vec<[f64; N]>,
}

/// Runs each side once a round, in an order that rotates. `measure` is given the side's number.
///
/// # Errors
/// The first error of a side.
pub async fn alternate<const N: usize>(
    rounds: usize,
    names: [&str; N],
    mut measure: impl AsyncFnMut(usize) -> anyhow::Result<f64>,
) -> anyhow::Result<Rounds<N>> {
    let mut all = Vec::new();
    for round in 0..rounds {
        let mut values = [0.0; N];
        for turn in 0..N {
            let side = (turn + round) % N;
            values[side] = measure(side).await?;
        }
        let told: Vec<String> = names
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name} {value:.0}"))
            .collect();
        eprintln!("    round {}: {}", round + 1, told.join(", "));
        all.push(values);
    }
    Ok(Rounds { rounds: all })
}

impl<const N: usize> Rounds<N> {
    /// One side's values.
    pub fn side(&self, side: usize) -> Spread {
        let values: Vec<f64> = self.rounds.iter().map(|round| round[side]).collect();
        Spread::of(&values)
    }

    /// `side` over another, round by round.
    pub fn ratio(&self, side: usize, other: usize) -> Spread {
        self.ratio_by(|round| round[side] / round[other])
    }

    /// What `of` makes of each round.
    pub fn ratio_by(&self, of: impl Fn(&[f64; N]) -> f64) -> Spread {
        let values: Vec<f64> = self.rounds.iter().map(of).collect();
        Spread::of(&values)
    }
}
