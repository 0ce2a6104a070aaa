//! A parsed request and a response under construction.
//!
//! Engines own the bytes on the wire. A [`Service`](super::server::Service) sees only complete,
//! correctly framed requests and never writes to a socket itself.

use std::fmt::{Display, Write as _};
use std::sync::Arc;
use std::task::Waker;

use crate::spans::{Trace, TraceFields};

/// One complete request. Every slice borrows from the connection's buffer.
pub struct Request<'a> {
    /// The method, for example `POST`. `HEAD` arrives as `GET`: the engine withholds the body, so
    /// a service answers both alike without knowing.
    pub method: &'a str,
    /// The request target in origin form: path and optional query.
    pub target: &'a str,
    /// The header fields in order of arrival.
    pub headers: &'a [httparse::Header<'a>],
    /// The whole body; empty when there is none.
    pub body: &'a [u8],
    /// Wakes the coroutine that runs this request, once it parks. One for all requests of the
    /// connection, to be shared.
    pub waker: &'a Arc<Waker>,
    /// To be called before the service parks; [`wake::wait`](super::server::wake::wait) does. It writes the answers
    /// that earlier pipelined requests are owed, so that they never wait behind this one.
    pub before_wait: &'a dyn Fn(),
    /// Of a sampled request; a service sets it for its handlers.
    pub trace: Option<&'a Trace>,
}

impl<'a> Request<'a> {
    /// The path of the target, without its query.
    pub fn path(&self) -> &'a str {
        self.target
            .split_once('?')
            .map_or(self.target, |(path, _)| path)
    }

    /// The query of the target, without its question mark; empty when there is none.
    pub fn query(&self) -> &'a str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }

    /// The values of every field with this name, compared without case (RFC 9110 5.1).
    pub fn header_values(&self, name: &'static str) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.headers
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value)
    }

    /// The fields of W3C Trace Context. A `traceparent` that comes twice is none.
    pub fn trace_fields(&self) -> TraceFields<'a> {
        let text = |value: &'a [u8]| std::str::from_utf8(value).ok();
        let mut parents = self.header_values("traceparent");
        let parent = parents.next().filter(|_| parents.next().is_none());
        TraceFields {
            parent: parent.and_then(text),
            state: self.header("tracestate").and_then(text),
        }
    }

    /// The value of the first field with this name.
    pub fn header(&self, name: &'static str) -> Option<&'a [u8]> {
        self.header_values(name).next()
    }
}

/// A response under construction. An engine keeps one for each connection and clears it between
/// requests, so that a steady connection allocates nothing for it.
#[derive(Default)]
pub struct Response {
    status: u16,
    fields: String,
    body: Vec<u8>,
}

impl Response {
    /// Makes this the empty `200` again and keeps its buffers.
    pub fn clear(&mut self) {
        self.status = 200;
        self.fields.clear();
        self.body.clear();
    }

    /// Sets the status code, 100 to 999.
    pub fn set_status(&mut self, status: u16) {
        self.status = status;
    }

    /// The status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Appends a field. Engines add `Content-Length`, `Date` and `Connection` themselves.
    ///
    /// A value with a byte that could end the field (anything but visible ASCII, space and tab)
    /// has that byte replaced by `?`, so that no value from a request can break a response apart.
    pub fn header(&mut self, name: &'static str, value: impl Display) {
        self.fields.push_str(name);
        self.fields.push_str(": ");
        let start = self.fields.len();
        // Writing to a String cannot fail.
        let _ = write!(self.fields, "{value}");
        let safe = |byte: u8| byte == b'\t' || (b' '..=b'~').contains(&byte);
        if !self.fields.as_bytes()[start..].iter().copied().all(safe) {
            let cleaned: String = self.fields[start..]
                .chars()
                .map(|c| {
                    if c.is_ascii() && safe(c as u8) {
                        c
                    } else {
                        '?'
                    }
                })
                .collect();
            self.fields.truncate(start);
            self.fields.push_str(&cleaned);
        }
        self.fields.push_str("\r\n");
    }

    /// Appends fields that a [`Response`] elsewhere has: each as `Name: value\r\n`, and safe already.
    pub fn header_lines(&mut self, lines: &[u8]) {
        // Always ASCII; anything else would not be a field.
        if let Ok(lines) = std::str::from_utf8(lines) {
            self.fields.push_str(lines);
        }
    }

    /// The fields so far, each as `Name: value\r\n`.
    pub fn fields(&self) -> &str {
        &self.fields
    }

    /// The body so far.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The body, to be written to.
    pub fn body_mut(&mut self) -> &mut Vec<u8> {
        &mut self.body
    }
}

/// The reason phrase of a status code (RFC 9110 15, RFC 6585); empty, which is allowed, for one
/// that they do not know.
pub fn reason(status: u16) -> &'static str {
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
        421 => "Misdirected Request",
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
