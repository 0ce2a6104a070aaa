//! A real Chromium with a person's hands: what is clicked is found by its words, is visible, and is hit by the mouse.
//!
//! It is driven over pipes, in the protocol of its own developer tools: JSON that ends in NUL.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::waiting::PATIENCE;

/// Pause between two looks at the page.
const LOOK: Duration = Duration::from_millis(20);
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// Finds what a person would: in the open dialog if there is one, among what is visible.
const FIND: &str = r#"
const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && !e.disabled;
const root = document.querySelector("dialog[open]") || document.body;
const words = (e) => e.textContent.replace(/\s+/g, " ").trim();
const find = (text, within) => {
  const all = [...root.querySelectorAll("button, a, summary, label")].filter((e) => seen(e) && words(e) === text);
  const box = (e) => e.closest("tr, .sku, .card, section, .head, header");
  return all.find((e) => !within || (box(e) && box(e).innerText.includes(within)));
};
const field = (label) => {
  const found = [...root.querySelectorAll("label")].find((e) => seen(e) && words(e).startsWith(label));
  return found && (found.control || null);
};
"#;

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    sent: u64,
    session: Option<String>,
    /// Errors and warnings of the page's console.
    pub complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts one; `None`, and a line that says so, if this machine has none.
    pub fn start() -> Option<Self> {
        let Some(program) = PROGRAMS.into_iter().find(|name| is_there(name)) else {
            println!("not run: the dashboard in a browser: chromium is not installed");
            return None;
        };
        let profile = tempfile::tempdir().expect("a directory");
        let mut child = Command::new("sh")
            .arg("-c")
            .arg("exec \"$0\" \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null")
            .arg(program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
            ])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
            ])
            .args([
                "--disable-sync",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
            ])
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the browser");
        let to = child.stdin.take().expect("a pipe");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).split(0);
        let (tell, from) = channel();
        std::thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                let message = serde_json::from_slice(&line).expect("JSON of the browser");
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Browser {
            child,
            to,
            from,
            sent: 0,
            session: None,
            complaints: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "flatten": true, "targetId": target["targetId"] });
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Runtime.enable", "Log.enable", "Page.enable"] {
            browser.call(domain, json!({}));
        }
        browser.call(
            "Emulation.setFocusEmulationEnabled",
            json!({ "enabled": true }),
        );
        browser.size(1280, 900);
        Some(browser)
    }

    /// Sends a command and returns its result.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.sent += 1;
        let mut message = json!({ "id": self.sent, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.to.write_all(&text).expect("the browser reads");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // The service may run on this very runtime.
            let message = tokio::task::block_in_place(|| self.from.recv_timeout(left));
            let message = message.unwrap_or_else(|why| match why {
                RecvTimeoutError::Timeout => panic!("{method}: no answer of the browser"),
                RecvTimeoutError::Disconnected => panic!("{method}: the browser has ended"),
            });
            if message["id"] == self.sent {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Value) {
        let parameters = &message["params"];
        let is_bad = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => parameters["type"] != "log",
            // A refusal that the page shows is also a line of the console.
            Some("Log.entryAdded") => parameters["entry"]["source"] != "network",
            _ => false,
        };
        if is_bad {
            self.complaints.push(parameters.to_string());
        }
    }

    /// The value of an expression of the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let expression = format!("(() => {{ {FIND} return ({expression}); }})()");
        let parameters = json!({ "expression": expression, "returnByValue": true });
        let result = self.call("Runtime.evaluate", parameters);
        let exception = &result["exceptionDetails"];
        assert!(exception.is_null(), "{expression}: {exception}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true, and returns its value.
    pub fn until(&mut self, what: &str, expression: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.value(expression);
            if !matches!(value, Value::Null | Value::Bool(false)) {
                return value;
            }
            if Instant::now() > deadline {
                let text = self.text();
                let _ = std::fs::create_dir_all("target/tmp");
                self.picture("target/tmp/browser.png");
                panic!("not seen: {what} (target/tmp/browser.png). The page says: {text}");
            }
            tokio::task::block_in_place(|| std::thread::sleep(LOOK));
        }
    }

    /// Opens a page.
    pub fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
        self.until("a page", "document.readyState === 'complete'");
    }

    /// The visible text of the dialog that is open, or else of the page.
    pub fn text(&mut self) -> String {
        let text = self.value("root.innerText");
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until a text is visible.
    pub fn sees(&mut self, text: &str) {
        self.until(text, &format!("root.innerText.includes({})", json!(text)));
    }

    /// Waits until no such text is visible.
    pub fn sees_no(&mut self, text: &str) {
        let gone = format!("!root.innerText.includes({})", json!(text));
        self.until(&format!("the end of {text}"), &gone);
    }

    /// Clicks the button, link or label with these words.
    pub fn click(&mut self, text: &str) {
        self.click_at(text, &format!("find({})", json!(text)));
    }

    /// The same in the row, card or section that has the text `within`.
    pub fn click_in(&mut self, within: &str, text: &str) {
        self.click_at(text, &format!("find({}, {})", json!(text), json!(within)));
    }

    fn click_at(&mut self, what: &str, element: &str) {
        // In the view, at rest, and above everything else at that point.
        let place = format!(
            "(() => {{ const e = {element}; if (!e) return null; \
               e.scrollIntoView({{ block: 'center', behavior: 'instant' }}); const box = e.getClientRects()[0]; \
               const at = [box.x + box.width / 2, box.y + box.height / 2], hit = document.elementFromPoint(...at); \
               return hit && (e.contains(hit) || hit.contains(e)) ? at : null; }})()"
        );
        let at = self.until(&format!("something to click: {what}"), &place);
        for kind in ["mousePressed", "mouseReleased"] {
            let event =
                json!({ "type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", event);
        }
    }

    /// Types a text into the field with this label, in place of what is there.
    pub fn enter(&mut self, label: &str, text: &str) {
        let field = format!("field({})", json!(label));
        self.click_at(label, &field);
        if self.value(&format!("{field}.type")) == "datetime-local" {
            // Its parts depend on the browser's language; the value does not.
            let set = format!(
                "(() => {{ const e = {field}; e.value = {}; \
                 e.dispatchEvent(new Event('input', {{ bubbles: true }})); return true; }})()",
                json!(text)
            );
            self.value(&set);
            return;
        }
        self.value(&format!("{field}.select()"));
        self.call("Input.insertText", json!({ "text": text }));
        if text.is_empty() {
            self.press("Delete");
        }
    }

    /// The value of the field with this label.
    pub fn field(&mut self, label: &str) -> String {
        let value = self.until(
            label,
            &format!("field({}) && field({0}).value", json!(label)),
        );
        value.as_str().unwrap_or_default().to_owned()
    }

    /// Presses a key: `Tab`, `Enter`, `Escape`, `Delete`.
    pub fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "Delete" => 46,
            _ => panic!("a key that is not known: {key}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if key == "Enter" && kind == "keyDown" {
                event["text"] = json!("\r");
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// Sets the size of the window; below 600 pixels it is a phone.
    pub fn size(&mut self, width: u32, height: u32) {
        let is_phone = width < 600;
        let metrics = json!({ "width": width, "height": height, "mobile": is_phone,
            "deviceScaleFactor": if is_phone { 2 } else { 1 } });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }

    /// Chooses the light or the dark colours.
    pub fn colours(&mut self, scheme: &str) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    /// Writes a picture of the whole page.
    pub fn picture(&mut self, path: &str) {
        use base64::Engine as _;
        let whole = json!({ "format": "png", "captureBeyondViewport": true });
        let picture = self.call("Page.captureScreenshot", whole);
        let data = picture["data"].as_str().expect("a picture");
        let bytes = base64::engine::general_purpose::STANDARD.decode(data);
        std::fs::write(path, bytes.expect("base64")).expect("write the picture");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_there(program: &str) -> bool {
    let looked = Command::new("sh")
        .arg("-c")
        .arg(format!("command -v {program}"))
        .stdout(Stdio::null())
        .status();
    looked.is_ok_and(|status| status.success())
}
