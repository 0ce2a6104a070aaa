//! Writing an answer: one JSON document, or lines of them.

use serde::Serialize;

use crate::http::message::Response;
use crate::http::problem::Problem;

/// Makes `response` a JSON answer with this status.
pub fn json(response: &mut Response, status: u16, body: &impl Serialize) {
    response.set_status(status);
    response.header("Content-Type", "application/json");
    if serde_json::to_writer(&mut *response.body_mut(), body).is_err() {
        // Our own types always serialize; a body cut short must not look like an answer.
        response.clear();
        Problem::internal().write_to(response);
    }
}

/// Appends one line of a batch's answer: `http_status`, and the members of `body`.
pub fn ndjson_line(out: &mut Vec<u8>, http_status: u16, body: &impl Serialize) {
    out.extend_from_slice(b"{\"http_status\":");
    out.extend_from_slice(itoa::Buffer::new().format(http_status).as_bytes());
    out.push(b',');
    let start = out.len();
    // Our own types serialize to an object with members, and writing to a vector cannot fail.
    let _ = serde_json::to_writer(&mut *out, body);
    if out.get(start) == Some(&b'{') {
        out.remove(start);
    }
    out.push(b'\n');
}
