//! From a [`Response`] to bytes, and the answers that the engine gives itself.

use super::Response;
use super::framing::FramingError;

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

/// What the `Connection` field of an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    /// Nothing: HTTP/1.1 goes on by itself.
    Implied,
    /// `keep-alive`, for a client of HTTP/1.0 that asked.
    KeepAlive,
    /// `close`.
    Close,
}

/// Appends the answer to `out`. `date` is an IMF-fixdate; to `HEAD`, the body is withheld.
pub(super) fn encode(
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
    out.extend_from_slice(reason_phrase(status).as_bytes());
    out.extend_from_slice(b"\r\nDate: ");
    out.extend_from_slice(date.as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(response.fields().as_bytes());
    // RFC 9110 8.6 and RFC 9112 6.3: these two have no body, whatever they say about its length.
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
    problem(error.status(), error.code(), error, response);
}

/// Makes `response` the problem document for a service that panicked.
pub(super) fn panicked(response: &mut Response) {
    let detail = "a defect of the server; the outcome of the request is unknown";
    problem(500, "internal", detail, response);
}

/// Makes `response` a problem document; no text may need escaping in JSON.
pub(in crate::http::data_plane) fn problem(
    status: u16,
    code: &str,
    detail: impl std::fmt::Display,
    response: &mut Response,
) {
    use std::io::Write as _;
    response.clear();
    response.set_status(status);
    response.header("Content-Type", "application/problem+json");
    let title = reason_phrase(status);
    // Writing to a Vec cannot fail.
    let _ = write!(
        response.body_mut(),
        r#"{{"type":"about:blank","title":"{title}","status":{status},"detail":"{detail}","code":"{code}"}}"#
    );
}

/// The reason phrase of RFC 9110; empty, which is allowed, for a status that it does not know.
pub(in crate::http::data_plane) fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
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
        encode(&response, "now", Persistence::Implied, false, &mut out);
        assert_eq!(out, b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n");
    }
}
