//! Pictures of measurements, as SVG: panels side by side, both axes logarithmic, so that what grows in proportion is a
//! straight line.

use std::fmt::Write as _;

/// Pixels of a panel, and of its frame within it.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 34.0;

/// A letter's width, about.
const LETTER: f64 = 7.0;

/// Panels in a row.
const COLUMNS: usize = 2;

/// Seen on a white and on a black page; the second is for what is compared with.
const COLOURS: [&str; 2] = ["#1f77b4", "#999999"];

/// What belongs together.
#[derive(Debug, Clone)]
pub struct Panel {
    /// What is drawn, with its units.
    pub title: String,
    /// At most two.
    pub curves: Vec<Curve>,
}

/// A row of measurements.
#[derive(Debug, Clone)]
pub struct Curve {
    /// What was measured.
    pub name: String,
    /// Where and how much, all more than 0, by growing x.
    pub points: Vec<(f64, f64)>,
}

/// An axis: which values lie at its ends.
struct Axis {
    least: f64,
    most: f64,
    from_px: f64,
    to_px: f64,
}

impl Axis {
    /// Holds all values that can be drawn, from a power of `base` to one of it.
    fn over(values: impl Iterator<Item = f64>, base: f64, from_px: f64, to_px: f64) -> Self {
        let drawn = values.filter(|value| value.is_finite() && *value > 0.0);
        let ends = drawn.fold(None, |ends: Option<(f64, f64)>, value| {
            let (least, most) = ends.unwrap_or((value, value));
            Some((least.min(value), most.max(value)))
        });
        let (least, most) = ends.unwrap_or((1.0, base));
        let least = base.powf((least.log(base) + 1e-9).floor());
        let most = base.powf((most.log(base) - 1e-9).ceil()).max(least * base);
        Self { least, most, from_px, to_px }
    }

    fn px(&self, value: f64) -> f64 {
        let share = (value / self.least).ln() / (self.most / self.least).ln();
        self.from_px + share * (self.to_px - self.from_px)
    }

    /// Where the lines are.
    fn marks(&self, base: f64) -> impl Iterator<Item = f64> {
        let most = self.most * 1.001;
        std::iter::successors(Some(self.least), move |mark| Some(mark * base))
            .take_while(move |mark| *mark <= most)
    }
}

/// Draws panels, row after row.
#[must_use]
pub fn svg(panels: &[Panel]) -> String {
    let columns = panels.len().clamp(1, COLUMNS);
    let rows = panels.len().div_ceil(columns);
    let (width, height) = (WIDTH * columns as f64, HEIGHT * rows as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#777\">\n"
    );
    for (at, panel) in panels.iter().enumerate() {
        let (x, y) = (WIDTH * (at % columns) as f64, HEIGHT * (at / columns) as f64);
        let _ = writeln!(out, "<g transform=\"translate({x},{y})\">");
        draw(panel, &mut out);
        out += "</g>\n";
    }
    out += "</svg>\n";
    out
}

fn draw(panel: &Panel, out: &mut String) {
    let points = || panel.curves.iter().flat_map(|curve| curve.points.iter());
    let x = Axis::over(points().map(|point| point.0), 2.0, LEFT, WIDTH - RIGHT);
    let y = Axis::over(points().map(|point| point.1), 2.0, HEIGHT - BOTTOM, TOP);
    let _ =
        writeln!(out, "<text x=\"{LEFT}\" y=\"18\" font-weight=\"bold\">{}</text>", panel.title);
    for mark in x.marks(2.0) {
        let px = x.px(mark);
        let bottom = HEIGHT - BOTTOM;
        let _ = writeln!(
            out,
            "<path d=\"M{px:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/><text x=\"{px:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{mark}</text>",
            bottom + 16.0
        );
    }
    for mark in y.marks(2.0) {
        let px = y.px(mark);
        let right = WIDTH - RIGHT;
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {px:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{mark}</text>",
            LEFT - 6.0,
            px + 4.0
        );
    }
    // Beside the title, from the right: inside the frame they would lie on what is drawn.
    let mut legend = WIDTH - RIGHT;
    for (curve, colour) in panel.curves.iter().zip(COLOURS) {
        let line: Vec<String> = curve
            .points
            .iter()
            .map(|point| format!("{:.1},{:.1}", x.px(point.0), y.px(point.1)))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            line.join(" ")
        );
        for point in &curve.points {
            let _ = writeln!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                x.px(point.0),
                y.px(point.1)
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{legend:.1}\" y=\"18\" text-anchor=\"end\" fill=\"{colour}\">{}</text>",
            curve.name
        );
        legend -= LETTER * curve.name.len() as f64 + 12.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_powers_and_places_values_by_their_ratio() {
        let axis = Axis::over([3.0, 50.0].into_iter(), 2.0, 0.0, 100.0);
        assert_eq!((axis.least, axis.most), (2.0, 64.0));
        assert_eq!(axis.marks(2.0).collect::<Vec<_>>(), [2.0, 4.0, 8.0, 16.0, 32.0, 64.0]);
        assert!((axis.px(2.0) - 0.0).abs() < 1e-9);
        assert!((axis.px(8.0) - 40.0).abs() < 1e-9);
        assert!((axis.px(64.0) - 100.0).abs() < 1e-9);
    }

    #[test]
    fn a_power_of_the_base_is_an_end_itself_and_one_value_has_room() {
        let axis = Axis::over([64.0, 1_024.0].into_iter(), 2.0, 0.0, 1.0);
        assert_eq!((axis.least, axis.most), (64.0, 1_024.0));
        let axis = Axis::over([8.0].into_iter(), 2.0, 0.0, 1.0);
        assert_eq!((axis.least, axis.most), (8.0, 16.0));
    }

    #[test]
    fn every_point_lies_within_its_panel() {
        let curve = |name: &str, by: f64| Curve {
            name: name.into(),
            points: (0..6).map(|at| (f64::from(1 << at), by * f64::from(3 << at))).collect(),
        };
        let panel = Panel { title: "one".into(), curves: vec![curve("a", 1.0), curve("b", 0.01)] };
        let drawn = svg(&[panel.clone(), panel.clone(), panel]);
        assert!(drawn.contains("viewBox=\"0 0 840 560\""), "two rows of two");
        let number = |line: &str, key: &str| -> Option<f64> {
            let rest = line.split_once(&format!("{key}=\""))?.1;
            rest.split_once('"')?.0.parse().ok()
        };
        let circles = drawn.lines().filter(|line| line.starts_with("<circle"));
        let places: Vec<_> =
            circles.filter_map(|line| Some((number(line, "cx")?, number(line, "cy")?))).collect();
        assert_eq!(places.len(), 36);
        for (x, y) in places {
            assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y));
        }
    }
}
