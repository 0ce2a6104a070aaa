//! Encoding a [`Response`], and the answers of the engine itself.

use super::framing::FramingError;
use crate::http::message::{Response, reason};
use crate::http::problem::Problem;

/// The whole answer to a connection that finds the server full.
pub(super) const OVERLOADED: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    Content-Type: application/problem+json\r\n\
    Retry-After: 1\r\n\
    Content-Length: 136\r\n\
    Connection: close\r\n\
    \r\n\
    {\"type\":\"about:blank\",\"title\":\"Service Unavailable\",\"status\":503,\
    \"detail\":\"the server has no room for a connection\",\"code\":\"overloaded\"}";

/// The interim answer to `Expect: 100-continue`.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The `Connection` field of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    /// Nothing: HTTP/1.1 goes on by itself.
    Implied,
    /// `keep-alive`, for a client of HTTP/1.0 that asked.
    KeepAlive,
    /// `close`.
    Close,
}

impl Persistence {
    /// The field for a connection that goes on or ends, after a request of HTTP/1.0 or HTTP/1.1.
    pub(super) fn of(goes_on: bool, http_1_0: bool) -> Self {
        match (goes_on, http_1_0) {
            (false, _) => Persistence::Close,
            (true, true) => Persistence::KeepAlive,
            (true, false) => Persistence::Implied,
        }
    }
}

/// Appends the answer to `out`. `date` is an IMF-fixdate; to `HEAD`, the body is withheld.
pub(super) fn response(
    response: &Response,
    date: &str,
    persistence: Persistence,
    to_head: bool,
    out: &mut Vec<u8>,
) {
    let status = response.status();
    let mut digits = itoa::Buffer::new();
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(digits.format(status).as_bytes());
    out.push(b' ');
    out.extend_from_slice(reason(status).as_bytes());
    out.extend_from_slice(b"\r\nDate: ");
    out.extend_from_slice(date.as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(response.fields().as_bytes());
    // RFC 9110 8.6 and RFC 9112 6.3: these two never have a body.
    let bodiless = matches!(status, 204 | 304);
    if !bodiless {
        out.extend_from_slice(b"Content-Length: ");
        out.extend_from_slice(digits.format(response.body().len()).as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(match persistence {
        Persistence::Implied => b"\r\n".as_slice(),
        Persistence::KeepAlive => b"Connection: keep-alive\r\n\r\n",
        Persistence::Close => b"Connection: close\r\n\r\n",
    });
    if !bodiless && !to_head {
        out.extend_from_slice(response.body());
    }
}

/// Makes `response` the problem document (RFC 9457) for bytes that are not a request.
pub(super) fn refused(error: FramingError, response: &mut Response) {
    response.clear();
    let detail = error.to_string();
    Problem::new(error.status(), error.code(), detail).write_to(response);
}

/// Makes `response` the problem document for a body for which nothing is left of the budget.
pub(super) fn no_room(response: &mut Response) {
    response.clear();
    let detail = "too many bytes of request bodies are on their way; send this one again";
    Problem::new(503, "overloaded", detail)
        .retry_after(1)
        .write_to(response);
}

/// Makes `response` the problem document for a request that did not complete in time.
pub(super) fn timed_out(response: &mut Response) {
    response.clear();
    let detail = "the request did not arrive in time; it was not served";
    Problem::new(408, "request_timeout", detail).write_to(response);
}

/// Makes `response` the problem document for a service that panicked.
pub(super) fn panicked(response: &mut Response) {
    // The beginning of an answer by the service goes.
    response.clear();
    let detail = "a defect of the server; the outcome of the request is unknown";
    Problem::new(500, "internal", detail).write_to(response);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_the_ready_made_answer_is_true() {
        let text = std::str::from_utf8(OVERLOADED).expect("ASCII");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())),
            "{}",
            body.len()
        );
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(body["code"], "overloaded");
    }

    #[test]
    fn an_answer_that_cannot_have_a_body_has_no_length() {
        let mut response = Response::default();
        response.clear();
        response.set_status(204);
        response.body_mut().extend_from_slice(b"lost");
        let mut out = Vec::new();
        super::response(&response, "now", Persistence::Implied, false, &mut out);
        assert_eq!(out, b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n");
    }
}
