//! Latencies by percentile, as HdrHistogram's own plots draw them: the axis is logarithmic in `1 - p`,
//! so that each further nine has as much room as the last.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
const PLOT_WIDTH: f64 = 700.0;
const PLOT_HEIGHT: f64 = 350.0;
/// Nines that have room.
const NINES: f64 = 5.0;
const COLOURS: [&str; 4] = ["#2a9d8f", "#264653", "#e9a23b", "#c8553d"];

/// A line of the picture.
pub struct Curve {
    name: String,
    /// Quantiles and milliseconds.
    points: Vec<(f64, f64)>,
    dashed: bool,
}

impl Curve {
    /// Of latencies in microseconds.
    pub fn of(name: String, latency: &Histogram<u64>) -> Self {
        let steps = latency.iter_quantiles(10);
        let points = steps.map(|step| {
            let ms = step.value_iterated_to() as f64 / 1_000.0;
            (step.quantile_iterated_to(), ms)
        });
        Curve {
            name,
            points: points.collect(),
            dashed: false,
        }
    }

    /// The same, dashed.
    pub fn dashed(self) -> Self {
        Curve {
            dashed: true,
            ..self
        }
    }
}

/// A picture of curves; a dashed one has the colour of the one after it.
pub fn svg(curves: &[Curve]) -> String {
    let greatest = curves
        .iter()
        .flat_map(|curve| &curve.points)
        .fold(1.0_f64, |greatest, (_, ms)| greatest.max(*ms));
    // A whole decade above.
    let top_ms = 10_f64.powf(greatest.log10().ceil());
    let bottom_ms = 0.1;
    let x = |quantile: f64| {
        let nines = -(1.0 - quantile).max(1e-9).log10();
        LEFT + nines.min(NINES) / NINES * PLOT_WIDTH
    };
    let y = |ms: f64| {
        let share = (ms.max(bottom_ms) / bottom_ms).log10() / (top_ms / bottom_ms).log10();
        TOP + PLOT_HEIGHT * (1.0 - share)
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"14\">Waiting orders (201): latency from the moment each was due, by share \
         of capacity</text>\n"
    );
    // Writing to a string cannot fail.
    let mut decade = bottom_ms;
    while decade <= top_ms * 1.001 {
        let at = y(decade);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{decade} ms</text>",
            LEFT + PLOT_WIDTH,
            LEFT - 8.0,
            at + 4.0
        );
        decade *= 10.0;
    }
    for (quantile, name) in [
        (0.0, "0"),
        (0.9, "90 %"),
        (0.99, "99 %"),
        (0.999, "99.9 %"),
        (0.9999, "99.99 %"),
    ] {
        let at = x(quantile);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>",
            TOP + PLOT_HEIGHT,
            TOP + PLOT_HEIGHT + 20.0
        );
    }
    let mut colours = COLOURS.iter().cycle().peekable();
    for (number, curve) in curves.iter().enumerate() {
        let colour = match curve.dashed {
            true => colours.peek().copied(),
            false => colours.next(),
        };
        let (colour, name) = (colour.unwrap_or(&"black"), &curve.name);
        let dashes = if curve.dashed {
            " stroke-dasharray=\"5 4\""
        } else {
            ""
        };
        let path: Vec<String> = curve
            .points
            .iter()
            .map(|(quantile, ms)| format!("{:.1},{:.1}", x(*quantile), y(*ms)))
            .collect();
        let line = TOP + 20.0 * number as f64;
        let _ = writeln!(
            out,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes} points=\"{}\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            path.join(" "),
            LEFT + PLOT_WIDTH + 20.0,
            line + 12.0
        );
    }
    out.push_str("</svg>\n");
    out
}
