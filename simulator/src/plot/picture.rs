//! Pixels: smooth lines, text in built-in fonts, and PNG.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::{self, Write},
};

use embedded_graphics::{
    Drawable as _, Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Point, Size},
    mono_font::{MonoFont, MonoTextStyle},
    pixelcolor::{Rgb888, RgbColor as _},
    text::{Alignment, Baseline, Text, TextStyleBuilder},
};

/// A place in a picture, in pixels from its upper left corner.
pub(super) type Place = (f64, f64);

/// How a line is drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stroke {
    pub(super) color: Rgb888,
    pub(super) width: f64,
    /// The length of dashes and of the gaps between them; none: no gaps.
    pub(super) dash: Option<f64>,
}

/// A white picture that can be drawn on.
pub(super) struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<Rgb888>,
}

impl Picture {
    pub(super) fn new(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![Rgb888::WHITE; (width * height) as usize] }
    }

    /// Draws a smooth line through these places.
    pub(super) fn line(&mut self, places: &[Place], stroke: Stroke) {
        let parts = match stroke.dash {
            None => places.windows(2).map(|pair| (pair[0], pair[1])).collect(),
            Some(dash) => dashes(places, dash),
        };
        // How much of each pixel the line covers: the most that any of its parts does, so that the places where
        // two parts meet are no darker than the rest.
        let mut covered = BTreeMap::new();
        for (from, to) in parts {
            self.cover(&mut covered, from, to, stroke.width);
        }
        for (pixel, part) in covered {
            self.pixels[pixel] = mixed(self.pixels[pixel], stroke.color, part);
        }
    }

    /// Adds one straight part of a line.
    fn cover(&self, covered: &mut BTreeMap<usize, f64>, from: Place, to: Place, width: f64) {
        let reach = width / 2.0 + 1.0;
        let range = |a: f64, b: f64, end: u32| {
            let first = (a.min(b) - reach).floor().clamp(0.0, f64::from(end)) as u32;
            let last = (a.max(b) + reach).ceil().clamp(0.0, f64::from(end)) as u32;
            first..last
        };
        for y in range(from.1, to.1, self.height) {
            for x in range(from.0, to.0, self.width) {
                let center = (f64::from(x) + 0.5, f64::from(y) + 0.5);
                let part = (width / 2.0 + 0.5 - distance(center, from, to)).min(1.0);
                if part > 0.0 {
                    let most = covered.entry((y * self.width + x) as usize).or_insert(0.0);
                    *most = part.max(*most);
                }
            }
        }
    }

    /// Writes text; its middle line is at the place's height.
    pub(super) fn text(
        &mut self,
        text: &str,
        place: Place,
        alignment: Alignment,
        font: &MonoFont<'_>,
        color: Rgb888,
    ) {
        let style = MonoTextStyle::new(font, color);
        let layout =
            TextStyleBuilder::new().alignment(alignment).baseline(Baseline::Middle).build();
        let point = Point::new(place.0.round() as i32, place.1.round() as i32);
        let Ok(_) = Text::with_text_style(text, point, style, layout).draw(self);
    }

    /// Writes text from below upwards, with its middle at the place.
    pub(super) fn upright(&mut self, text: &str, place: Place, font: &MonoFont<'_>, color: Rgb888) {
        let style = MonoTextStyle::new(font, color);
        let layout =
            TextStyleBuilder::new().alignment(Alignment::Center).baseline(Baseline::Middle).build();
        let mut turned = Turned {
            origin: Point::new(place.0.round() as i32, place.1.round() as i32),
            picture: self,
        };
        let Ok(_) = Text::with_text_style(text, Point::zero(), style, layout).draw(&mut turned);
    }

    /// Writes the picture as PNG.
    pub(super) fn write(&self, to: impl Write) -> io::Result<()> {
        let mut encoder = png::Encoder::new(to, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let bytes: Vec<u8> =
            self.pixels.iter().flat_map(|pixel| [pixel.r(), pixel.g(), pixel.b()]).collect();
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&bytes)?;
        Ok(writer.finish()?)
    }
}

impl OriginDimensions for Picture {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Picture {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(point, color) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y)) else { continue };
            if x < self.width && y < self.height {
                self.pixels[(y * self.width + x) as usize] = color;
            }
        }
        Ok(())
    }
}

/// A picture turned a quarter to the left around a point of it.
struct Turned<'a> {
    picture: &'a mut Picture,
    origin: Point,
}

impl OriginDimensions for Turned<'_> {
    fn size(&self) -> Size {
        Size::new(self.picture.height, self.picture.width)
    }
}

impl DrawTarget for Turned<'_> {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        let origin = self.origin;
        let turn = |point: Point| Point::new(origin.x + point.y, origin.y - point.x);
        let pixels = pixels.into_iter().map(|Pixel(point, color)| Pixel(turn(point), color));
        self.picture.draw_iter(pixels)
    }
}

/// The distance of a place from a straight line that ends at both ends.
fn distance(place: Place, from: Place, to: Place) -> f64 {
    let (along_x, along_y) = (to.0 - from.0, to.1 - from.1);
    let length_squared = along_x * along_x + along_y * along_y;
    let part = if length_squared > 0.0 {
        ((place.0 - from.0) * along_x + (place.1 - from.1) * along_y) / length_squared
    } else {
        0.0
    };
    let part = part.clamp(0.0, 1.0);
    (place.0 - from.0 - part * along_x).hypot(place.1 - from.1 - part * along_y)
}

/// The straight parts of a line with gaps.
fn dashes(places: &[Place], dash: f64) -> Vec<(Place, Place)> {
    let mut parts = Vec::new();
    // How far along the whole line this part of it begins.
    let mut before = 0.0;
    for pair in places.windows(2) {
        let (from, to) = (pair[0], pair[1]);
        let length = (to.0 - from.0).hypot(to.1 - from.1);
        let at = |along: f64| {
            let part = if length > 0.0 { along / length } else { 0.0 };
            (from.0 + (to.0 - from.0) * part, from.1 + (to.1 - from.1) * part)
        };
        let mut along = 0.0;
        while along < length {
            let in_cycle = (before + along) % (2.0 * dash);
            let drawn = in_cycle < dash;
            let left = if drawn { dash - in_cycle } else { 2.0 * dash - in_cycle };
            // A step is never nothing, or rounding could stop it here for ever.
            let next = (along + left.max(0.01)).min(length);
            if drawn {
                parts.push((at(along), at(next)));
            }
            along = next;
        }
        before += length;
    }
    parts
}

fn mixed(under: Rgb888, over: Rgb888, part: f64) -> Rgb888 {
    let mix = |under: u8, over: u8| {
        (f64::from(under) * (1.0 - part) + f64::from(over) * part).round() as u8
    };
    Rgb888::new(mix(under.r(), over.r()), mix(under.g(), over.g()), mix(under.b(), over.b()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_where_it_should_be_and_nowhere_else() {
        let mut picture = Picture::new(20, 10);
        let stroke = Stroke { color: Rgb888::BLACK, width: 2.0, dash: None };
        picture.line(&[(2.0, 5.0), (18.0, 5.0)], stroke);
        assert_eq!(picture.pixels[4 * 20 + 10], Rgb888::BLACK);
        assert_eq!(picture.pixels[5 * 20 + 10], Rgb888::BLACK);
        assert_eq!(picture.pixels[20 + 10], Rgb888::WHITE);
        // A line that leaves the picture is cut off.
        picture.line(&[(-50.0, -50.0), (100.0, 100.0)], stroke);
    }

    #[test]
    fn dashes_go_on_over_corners() {
        let parts = dashes(&[(0.0, 0.0), (3.0, 0.0), (3.0, 7.0)], 4.0);
        let expected =
            [((0.0, 0.0), (3.0, 0.0)), ((3.0, 0.0), (3.0, 1.0)), ((3.0, 5.0), (3.0, 7.0))];
        assert_eq!(parts, expected);
    }

    #[test]
    fn a_picture_is_written_as_png() {
        let mut bytes = Vec::new();
        Picture::new(30, 20).write(&mut bytes).expect("memory");
        assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    }
}
