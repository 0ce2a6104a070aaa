//! The same [`Service`] on stock `may_minihttp`, for benchmarks and for networks where something
//! trusted re-frames every request. Use [`super::hardened`] everywhere else.
//!
//! The limits of this engine, whose connection loop cannot be changed from here (`docs/ENGINES.md`
//! shows them input by input, and a test holds that page against the engine):
//!
//! - **Framing.** `Transfer-Encoding` and an invalid or repeated `Content-Length` are answered
//!   `501` and `400` here, but the connection goes on: the bytes of such a body are then parsed as
//!   the next request. Bare LF is a line end; `Host` is not checked; targets come as they are. A
//!   head that does not parse, or has more than 16 fields, closes the connection unanswered.
//! - **Bounds.** No limit on the head, on connections, on pipelined answers or on the bodies of all
//!   connections together; a request that is refused by its head has its body read all the same; no deadline of any
//!   kind; a body over the limit is answered `413` after all of it was read and thrown away. Out of
//!   descriptors it spins.
//! - **Fields.** A field is `&'static str` in it, 16 a response. So only fields of the table below
//!   are sent; `Location` and other values made for one request are left out (`order_id` in the
//!   body says the same), and a `Retry-After` beyond the table is sent as the largest in it.
//! - **Pipelining.** An answer waits for the requests that came in the same read, parked ones
//!   included: [`Request::before_wait`] does nothing.
//! - **Connection.** `Connection`, `Expect`, HTTP/1.0 and half-close are not looked at; `HEAD`
//!   has the length of its absent body, 0. There is no drain.
//! - **Listening.** It binds by itself, with `SO_REUSEPORT`: a second `may_minihttp` that starts on
//!   the same port at the same moment shares it without an error. `TCP_NODELAY` stays off.

use std::collections::HashSet;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

use may::coroutine::JoinHandle;
use may_minihttp::{HttpService, HttpServiceFactory};

use super::Service;
use super::limits::{BodyLimits, Limits};
use super::wake::CoroutineWaker;
use crate::http::message::{Request, Response, reason};
use crate::http::problem::Problem;
use crate::supervise::Supervisor;

/// Fields in one request or response, by the engine.
const HEADERS_MAX: usize = 16;

/// The largest `Retry-After` in the table, in seconds.
const RETRY_AFTER_MAX_S: u64 = 120;

/// Serves `service` on `address`; returns the coroutine and the address with the port it got.
/// Of `limits`, only those of bodies apply.
///
/// # Errors
///
/// When the address cannot be bound.
pub fn serve<S: Service>(
    address: SocketAddr,
    service: Arc<S>,
    limits: &Limits,
) -> io::Result<(JoinHandle<()>, SocketAddr)> {
    super::runtime::configure(0);
    // The engine would share a taken port in silence, and does not tell which one it got for 0.
    // Asking first catches a taken port and picks a free one, but for a race that it cannot win.
    let address = TcpListener::bind(address)?.local_addr()?;
    let handle = Factory {
        service,
        bodies: limits.bodies,
    }
    .start(address)?;
    Ok((handle, address))
}

/// The same, under supervision: only a defect ends the engine.
///
/// # Errors
///
/// As [`serve`], and when a thread cannot be started.
pub fn serve_supervised<S: Service>(
    address: SocketAddr,
    service: Arc<S>,
    limits: &Limits,
    supervisor: &Supervisor,
) -> io::Result<()> {
    let (engine, _) = serve(address, service, limits)?;
    supervisor.thread(
        "minihttp",
        || false,
        move || {
            // It has reported its panic, if that is what it was.
            let _ = engine.join();
        },
    )?;
    Ok(())
}

struct Factory<S> {
    service: Arc<S>,
    bodies: BodyLimits,
}

impl<S: Service> HttpServiceFactory for Factory<S> {
    type Service = Mounted<S>;

    fn new_service(&self, _id: usize) -> Mounted<S> {
        Mounted {
            service: self.service.clone(),
            bodies: self.bodies,
            // Made by the first call: this one still runs on the acceptor's coroutine.
            waker: None,
            head: String::new(),
            values: Vec::new(),
            body: Vec::new(),
            response: Response::default(),
        }
    }
}

/// The service of one connection, with its buffers.
struct Mounted<S> {
    service: Arc<S>,
    bodies: BodyLimits,
    waker: Option<Arc<Waker>>,
    // Reading the body consumes the request, so its head is copied here first: the method, the
    // target and the names in one, the values in the other.
    head: String,
    values: Vec<u8>,
    body: Vec<u8>,
    response: Response,
}

impl<S: Service> HttpService for Mounted<S> {
    fn call(
        &mut self,
        request: may_minihttp::Request<'_, '_, '_>,
        out: &mut may_minihttp::Response<'_>,
    ) -> io::Result<()> {
        self.response.clear();
        if let Err(refusal) = self.answer(request) {
            refusal.write_to(&mut self.response);
        }
        let status = self.response.status();
        out.status_code(usize::from(status), reason(status));
        for line in self
            .response
            .fields()
            .split_terminator("\r\n")
            .filter_map(static_field)
            .take(HEADERS_MAX)
        {
            out.header(line);
        }
        out.body_mut().extend_from_slice(self.response.body());
        Ok(())
    }
}

impl<S: Service> Mounted<S> {
    fn answer(&mut self, request: may_minihttp::Request<'_, '_, '_>) -> Result<(), Refusal> {
        let length = body_bytes(request.headers())?;
        let is_head = request.method() == "HEAD";
        let method = if is_head { "GET" } else { request.method() };

        self.head.clear();
        self.values.clear();
        self.head.push_str(method);
        self.head.push_str(request.path());
        let (method_end, target_end) = (method.len(), self.head.len());
        let mut ends = [(0, 0); HEADERS_MAX];
        let count = request.headers().len().min(HEADERS_MAX);
        for (end, header) in ends.iter_mut().zip(request.headers()) {
            self.head.push_str(header.name);
            self.values.extend_from_slice(header.value);
            *end = (self.head.len(), self.values.len());
        }

        let (Some(method), Some(target)) = (
            self.head.get(..method_end),
            self.head.get(method_end..target_end),
        ) else {
            return Err(Refusal::Defect);
        };
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let (mut name_start, mut value_start) = (target_end, 0);
        for (header, (name_end, value_end)) in headers.iter_mut().zip(ends).take(count) {
            header.name = self.head.get(name_start..name_end).unwrap_or_default();
            header.value = self.values.get(value_start..value_end).unwrap_or_default();
            (name_start, value_start) = (name_end, value_end);
        }
        let mut head = Request {
            method,
            target,
            headers: headers.get(..count).unwrap_or_default(),
            body: &[],
            waker: self
                .waker
                .get_or_insert_with(|| Arc::new(CoroutineWaker::current())),
            before_wait: &|| {},
            trace: None,
        };
        // A body that is refused, or too large, is thrown away as it is read.
        self.body.clear();
        let admitted = self.service.authorize(&head);
        let limit = self.bodies.bytes_max(target);
        // Dropping the reader throws away what is left of the body.
        let body = request.body();
        if let Err(problem) = admitted {
            problem.write_to(&mut self.response);
            if is_head {
                self.response.body_mut().clear();
            }
            return Ok(());
        }
        if length > limit {
            return Err(Refusal::TooLarge);
        }
        // The engine bounds the reader by the length as well; a shorter body was cut off.
        let read = body.take(length as u64).read_to_end(&mut self.body);
        if read.map_or(true, |bytes| bytes < length) {
            return Err(Refusal::Truncated);
        }

        head.body = &self.body;
        let (service, response) = (&*self.service, &mut self.response);
        catch_unwind(AssertUnwindSafe(|| service.call(&head, response)))
            .map_err(|_| Refusal::Defect)?;
        if is_head {
            self.response.body_mut().clear();
        }
        Ok(())
    }
}

/// The length of the body, by the rules of the hardened engine. The engine's own reader panics on
/// a length that is not a number, so it is only used after this.
fn body_bytes(headers: &[httparse::Header<'_>]) -> Result<usize, Refusal> {
    let mut length = None;
    for header in headers {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Refusal::TransferEncoding);
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = header.value.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(header.value)
                .ok()
                .filter(|_| digits)
                .and_then(|text| text.parse::<usize>().ok());
            if length.is_some() || number.is_none() {
                return Err(Refusal::ContentLength);
            }
            length = number;
        }
    }
    Ok(length.unwrap_or(0))
}

#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    ContentLength,
    TransferEncoding,
    TooLarge,
    Truncated,
    Defect,
}

impl Refusal {
    fn write_to(&self, response: &mut Response) {
        let (status, code, detail) = match self {
            Self::ContentLength => (400, "bad_request", "Content-Length must be a single number"),
            Self::TransferEncoding => (501, "bad_request", "Transfer-Encoding is not implemented"),
            Self::TooLarge => (413, "body_too_large", "the request body is too large"),
            Self::Truncated => (400, "bad_request", "the request body was cut off"),
            Self::Defect => (500, "internal", "a defect of the server"),
        };
        response.clear();
        Problem::new(status, code, detail).write_to(response);
    }
}

/// The static twin of a field, if it has one.
fn static_field(line: &str) -> Option<&'static str> {
    static TABLE: OnceLock<HashSet<&'static str>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let retry_after = (0..=RETRY_AFTER_MAX_S)
            // Leaked once, for the life of the process: the engine takes nothing else.
            .map(|seconds| &*Box::leak(format!("Retry-After: {seconds}").into_boxed_str()));
        FIELDS.iter().copied().chain(retry_after).collect()
    });
    if let Some(line) = table.get(line) {
        return Some(line);
    }
    let seconds: u64 = line.strip_prefix("Retry-After: ")?.parse().ok()?;
    let largest = format!("Retry-After: {}", seconds.min(RETRY_AFTER_MAX_S));
    table.get(largest.as_str()).copied()
}

const FIELDS: &[&str] = &[
    "Allow: GET",
    "Allow: GET, HEAD",
    "Allow: POST",
    "Allow: GET, POST",
    "Cache-Control: no-store",
    "Cache-Control: no-cache",
    "Content-Type: application/json",
    "Content-Type: application/json; charset=utf-8",
    "Content-Type: application/problem+json",
    "Content-Type: application/x-ndjson",
    "Content-Type: text/plain",
    "Content-Type: text/plain; charset=utf-8",
    "Idempotency-Replayed: true",
    "Preference-Applied: respond-async",
    "WWW-Authenticate: Bearer",
];
