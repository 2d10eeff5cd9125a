//! One chart: axes with ticks and units, lines, and a legend beside it.

use embedded_graphics::{
    mono_font::iso_8859_1::{FONT_9X15, FONT_9X15_BOLD},
    pixelcolor::Rgb888,
    text::Alignment,
};

use super::picture::{Picture, Place, Stroke};

const INK: Rgb888 = Rgb888::new(0x22, 0x22, 0x22);
const MUTED: Rgb888 = Rgb888::new(0x66, 0x66, 0x66);
const GRID: Rgb888 = Rgb888::new(0xe4, 0xe4, 0xe4);

/// About how many ticks an axis has.
const TICKS: f64 = 7.0;

/// Room left of, right of (for the legend), above and below the axes, in pixels.
const MARGINS: [f64; 4] = [92.0, 276.0, 36.0, 62.0];

/// One line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) color: Rgb888,
    pub(super) dashed: bool,
    pub(super) points: Vec<(f64, f64)>,
}

/// An axis: what it shows, with its unit, and from where to where.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    pub(super) title: &'static str,
    pub(super) from: f64,
    pub(super) to: f64,
}

#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Line>,
}

impl Chart {
    /// Draws the chart between these heights of the picture, over its whole width.
    pub(super) fn draw(&self, picture: &mut Picture, width: f64, top: f64, bottom: f64) {
        let area = Area {
            left: MARGINS[0],
            right: width - MARGINS[1],
            top: top + MARGINS[2],
            bottom: bottom - MARGINS[3],
        };
        self.draw_axes(picture, &area);
        for line in &self.lines {
            let places: Vec<Place> =
                line.points.iter().map(|point| area.place(&self.x, &self.y, *point)).collect();
            picture.line(&places, line.stroke());
        }
        let title = (area.left, top + 16.0);
        picture.text(&self.title, title, Alignment::Left, &FONT_9X15_BOLD, INK);
        for (at, line) in self.lines.iter().enumerate() {
            let y = area.top + 14.0 + 22.0 * at as f64;
            let x = area.right + 18.0;
            picture.line(&[(x, y), (x + 28.0, y)], line.stroke());
            picture.text(&line.name, (x + 38.0, y), Alignment::Left, &FONT_9X15, INK);
        }
    }

    fn draw_axes(&self, picture: &mut Picture, area: &Area) {
        let grid = Stroke { color: GRID, width: 1.0, dash: None };
        let (ticks, decimals) = self.x.ticks();
        for tick in ticks {
            let (x, _) = area.place(&self.x, &self.y, (tick, self.y.from));
            let x = x.floor() + 0.5;
            picture.line(&[(x, area.top), (x, area.bottom)], grid);
            let place = (x, area.bottom + 15.0);
            let text = format!("{tick:.decimals$}");
            picture.text(&text, place, Alignment::Center, &FONT_9X15, MUTED);
        }
        let (ticks, decimals) = self.y.ticks();
        for tick in ticks {
            let (_, y) = area.place(&self.x, &self.y, (self.x.from, tick));
            let y = y.floor() + 0.5;
            picture.line(&[(area.left, y), (area.right, y)], grid);
            let text = format!("{tick:.decimals$}");
            picture.text(&text, (area.left - 8.0, y), Alignment::Right, &FONT_9X15, MUTED);
        }
        let frame = Stroke { color: MUTED, width: 1.0, dash: None };
        let corner = (area.left.floor() - 0.5, area.bottom.floor() + 0.5);
        picture.line(&[(corner.0, area.top), corner, (area.right, corner.1)], frame);
        let middle = (area.left + area.right) / 2.0;
        let below = (middle, area.bottom + 38.0);
        picture.text(self.x.title, below, Alignment::Center, &FONT_9X15, INK);
        let beside = (24.0, (area.top + area.bottom) / 2.0);
        picture.upright(self.y.title, beside, &FONT_9X15, INK);
    }
}

impl Line {
    fn stroke(&self) -> Stroke {
        let (width, dash) = if self.dashed { (1.6, Some(7.0)) } else { (2.4, None) };
        Stroke { color: self.color, width, dash }
    }
}

impl Axis {
    /// Round numbers along the axis, and how many decimals they need.
    fn ticks(&self) -> (Vec<f64>, usize) {
        let rough = (self.to - self.from) / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * power).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(rough);
        let first = (self.from / step - 1e-9).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        let decimals = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
        ((first..=last).map(|tick| tick as f64 * step).collect(), decimals)
    }
}

/// Where the axes are in the picture.
struct Area {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Area {
    /// Where a point is; one beyond the axes is at their end.
    fn place(&self, x: &Axis, y: &Axis, point: (f64, f64)) -> Place {
        let part =
            |axis: &Axis, value: f64| ((value - axis.from) / (axis.to - axis.from)).clamp(0.0, 1.0);
        (
            self.left + (self.right - self.left) * part(x, point.0),
            self.bottom - (self.bottom - self.top) * part(y, point.1),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        let ticks = |from, to| Axis { title: "", from, to }.ticks();
        assert_eq!(ticks(0.0, 100.0), (vec![0.0, 20.0, 40.0, 60.0, 80.0, 100.0], 0));
        let (some, decimals) = ticks(7.9, 8.6);
        assert_eq!((some.len(), decimals), (8, 1));
        assert!((some[0] - 7.9).abs() < 1e-9);
        let (some, decimals) = ticks(0.0, 1.1);
        assert_eq!((some.len(), decimals), (6, 1));
    }
}
