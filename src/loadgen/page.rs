//! The result as a page: one file, nothing loaded from elsewhere, to be opened or sent on.

use serde::Serialize;

use super::report::LoadReport;

/// The page without its data. The two marks are each found once; a test sees to it.
const PAGE: &str = include_str!("page.html");
const TITLE_MARK: &str = "{{title}}";
const DATA_MARK: &str = "{{data}}";

/// Headline, subtitle and checks beside the report.
#[derive(Debug, Clone, Serialize)]
pub struct PageOptions {
    /// The headline.
    pub title: String,
    /// A line below it: what was run, on what.
    pub subtitle: Option<String>,
    /// Checks made after the run, in the order of the page; may be empty.
    pub checks: Vec<Check>,
    /// A node that was killed; marked in the picture of the lanes.
    pub killed: Option<KilledNode>,
}

impl Default for PageOptions {
    fn default() -> Self {
        Self {
            title: "Millrace under load".to_owned(),
            subtitle: None,
            checks: Vec::new(),
            killed: None,
        }
    }
}

/// A node that was killed during the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KilledNode {
    /// Its number.
    pub node: u8,
    /// When, in milliseconds after the first request's moment.
    pub at_ms: f64,
}

/// One checked promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The promise, such as "No unit is sold twice".
    pub name: String,
    /// Whether it holds.
    pub ok: bool,
    /// The figures behind it.
    pub detail: String,
}

#[derive(Serialize)]
struct PageData<'a> {
    options: &'a PageOptions,
    report: &'a LoadReport,
}

/// The whole page as HTML.
pub fn render_page(report: &LoadReport, options: &PageOptions) -> String {
    // Plain figures and texts with text keys: there is nothing in it that JSON cannot write.
    let data = serde_json::to_string(&PageData { options, report })
        .unwrap_or_else(|e| format!("{{\"error\":\"{}\"}}", e.to_string().replace('"', "'")));
    let mut page = String::with_capacity(PAGE.len() + data.len() + 256);
    let (head, rest) = PAGE.split_once(TITLE_MARK).unwrap_or((PAGE, ""));
    let (body, tail) = rest.split_once(DATA_MARK).unwrap_or((rest, ""));
    page.push_str(head);
    page.push_str(&escape_html(&options.title));
    page.push_str(body);
    page.push_str(&escape_json(&data));
    page.push_str(tail);
    page
}

/// JSON that cannot end its `<script>` element, nor open a comment or another one in it: `<` only
/// occurs within strings, where it may be written as an escape.
fn escape_json(json: &str) -> String {
    json.replace('<', "\\u003c")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::plan::LoadPlan;
    use super::super::recorder::Recorder;
    use super::*;

    #[test]
    fn no_text_can_break_out_of_the_page() {
        let plan = LoadPlan::new("http://127.0.0.1:1").with_sku("</script><b>", 1.0);
        let report = LoadReport::draw(&plan, &Recorder::new(100, false), 100);
        let options = PageOptions {
            title: "<i>&".to_owned(),
            subtitle: Some("<!-- <script> {{data}}".to_owned()),
            ..PageOptions::default()
        };
        let page = render_page(&report, &options);
        assert!(page.contains("<title>&lt;i&gt;&amp;</title>"));
        assert!(!page.contains("</script><b>"));
        let (_, data) = page.split_once("id=\"data\">").unwrap();
        let (data, _) = data.split_once("</script>").unwrap();
        let back: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(back["report"]["plan"]["skus"][0]["sku_id"], "</script><b>");
        assert_eq!(back["options"]["subtitle"], "<!-- <script> {{data}}");
    }

    #[test]
    fn the_page_loads_nothing_from_elsewhere() {
        assert_eq!(PAGE.matches(TITLE_MARK).count(), 1);
        assert_eq!(PAGE.matches(DATA_MARK).count(), 1);
        let text = PAGE.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "src=", "@import", "url(", "fetch("] {
            assert!(!text.contains(outside), "{outside}");
        }
    }
}
