//! Raw bytes that a server of HTTP/1.1 may be sent, what the hardened engine answers, and what
//! stock minihttp does. One list for every test that sends them.

/// What comes behind the bytes of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// A request for `/after`, in the same write.
    Another,
    /// The end of the client's side.
    HalfClose,
    /// Nothing; the client waits.
    Silence,
}

/// One input and its outcomes, written as the statuses of the answers in order, each with the
/// target that the service saw, and how it ends: `closes`, `goes on` or, where neither a further
/// answer nor an end comes, `waits`.
pub struct Rule {
    /// What the bytes are.
    pub name: &'static str,
    /// The bytes.
    pub input: String,
    /// What follows them.
    pub then: Then,
    /// What the hardened engine does.
    pub hardened: &'static str,
    /// What stock minihttp does, with our service mounted; several where it is left to chance.
    pub minihttp: &'static str,
    /// What stock minihttp lacks here; empty where it does as well.
    pub lacks: &'static str,
}

/// The request behind the bytes of a rule.
pub const AFTER: &str = "GET /after HTTP/1.1\r\nHost: h\r\n\r\n";

/// Every rule. Limits: head 2048 bytes, body 1000, batch 100,000. Long because it is a table: one entry a rule.
pub fn rules() -> Vec<Rule> {
    use Then::{Another, HalfClose, Silence};
    let inner = "GET /inner HTTP/1.1\r\nHost: h\r\n\r\n";
    let post = "POST /a HTTP/1.1\r\nHost: h\r\n";
    let get = "GET /a HTTP/1.1\r\nHost: h\r\n";
    let rule = |name, input: String, then, hardened, minihttp, lacks| Rule {
        name,
        input,
        then,
        hardened,
        minihttp,
        lacks,
    };
    vec![
        rule(
            "the same Content-Length twice",
            format!("{post}Content-Length: 35\r\nContent-Length: 35\r\n\r\n{inner}"),
            Another,
            "400, closes",
            "400, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "two different Content-Lengths",
            format!("{post}Content-Length: 35\r\nContent-Length: 0\r\n\r\n{inner}"),
            Another,
            "400, closes",
            "400, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "a signed Content-Length",
            format!("{post}Content-Length: +35\r\n\r\n{inner}"),
            Another,
            "400, closes",
            "400, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "a negative Content-Length",
            format!("{post}Content-Length: -1\r\n\r\nx"),
            Another,
            "400, closes",
            "400, 200 /after, goes on",
            "the refusal does not end the connection",
        ),
        rule(
            "a Content-Length in words",
            format!("{post}Content-Length: nine\r\n\r\n{inner}"),
            Another,
            "400, closes",
            "400, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "Transfer-Encoding: chunked",
            format!("{post}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            Another,
            "501, closes",
            "closes",
            "the chunks are parsed as a request, which fails; the `501` is lost with it",
        ),
        rule(
            "Transfer-Encoding: identity",
            format!("{post}Transfer-Encoding: identity\r\n\r\n{inner}"),
            Another,
            "501, closes",
            "501, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "Transfer-Encoding and Content-Length",
            format!("{post}Transfer-Encoding: chunked\r\nContent-Length: 35\r\n\r\n{inner}"),
            Another,
            "400, closes",
            "501, 200 /inner, 200 /after, goes on",
            "the refusal does not end the connection: the bytes of the body are served as requests",
        ),
        rule(
            "a body over its limit, announced",
            format!("{post}Content-Length: 1001\r\n\r\n"),
            Another,
            "413, closes",
            "waits",
            "it reads the whole body, and whatever follows as a part of it, before it refuses",
        ),
        rule(
            "a body length beyond any number",
            format!("{post}Content-Length: 99999999999999999999\r\n\r\n"),
            Another,
            "413, closes",
            "400, 200 /after, goes on",
            "the refusal does not end the connection",
        ),
        rule(
            "a batch over its limit, announced",
            "POST /v1/orders:batch HTTP/1.1\r\nHost: h\r\nContent-Length: 100001\r\n\r\n"
                .to_owned(),
            Another,
            "413, closes",
            "waits",
            "it reads the whole body, and whatever follows as a part of it, before it refuses",
        ),
        rule(
            "a head over its limit",
            format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "x".repeat(3000)),
            Another,
            "431, closes",
            "200 (long target), 200 /after, goes on",
            "a limit",
        ),
        rule(
            "17 header fields",
            format!("{get}{}\r\n", "X: 1\r\n".repeat(16)),
            Another,
            "200 /a, 200 /after, goes on",
            "closes",
            "room for more than 16 fields; it closes without a word",
        ),
        rule(
            "65 header fields",
            format!("{get}{}\r\n", "X: 1\r\n".repeat(64)),
            Another,
            "431, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "no Host",
            "GET /a HTTP/1.1\r\n\r\n".to_owned(),
            Another,
            "400, closes",
            "200 /a, 200 /after, goes on",
            "a look at `Host`",
        ),
        rule(
            "two Hosts",
            format!("{get}Host: h\r\n\r\n"),
            Another,
            "400, closes",
            "200 /a, 200 /after, goes on",
            "a look at `Host`",
        ),
        rule(
            "a space before the colon",
            "GET /a HTTP/1.1\r\nHost : h\r\n\r\n".to_owned(),
            Another,
            "400, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "a folded field",
            format!("{get}X: a\r\n b\r\n\r\n"),
            Another,
            "400, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "lines that end in a bare LF",
            "GET /a HTTP/1.1\nHost: h\n\n".to_owned(),
            Another,
            "400, closes",
            "200 /a, 200 /after, goes on",
            "strict line ends, on which all readers of the bytes agree",
        ),
        rule(
            "a bare CR in a field",
            format!("{get}X: a\rb\r\n\r\n"),
            Another,
            "400, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "a NUL in a field",
            format!("{get}X: a\0b\r\n\r\n"),
            Another,
            "400, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "no request at all",
            "\0\0\0\0".to_owned(),
            Another,
            "400, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "a target that is no path",
            "GET a HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(),
            Another,
            "400, closes",
            "200 a, 200 /after, goes on",
            "a check of the target",
        ),
        rule(
            "an absolute target",
            "GET http://h/a HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(),
            Another,
            "200 /a, 200 /after, goes on",
            "200 http://h/a, 200 /after, goes on",
            "the reduction to a path: no route matches",
        ),
        rule(
            "the preface of HTTP/2",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            Another,
            "505, closes",
            "closes",
            "an answer; it closes without a word",
        ),
        rule(
            "an expectation that nobody meets",
            format!("{get}Expect: tea\r\n\r\n"),
            Another,
            "417, closes",
            "200 /a, 200 /after, goes on",
            "a look at `Expect`",
        ),
        rule(
            "Expect: 100-continue, its body not sent",
            format!("{post}Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"),
            Silence,
            "100, 408, closes",
            "waits",
            "a look at `Expect`, and a deadline",
        ),
        rule(
            "a refusal behind a good request",
            format!("{get}\r\n\0"),
            Another,
            "200 /a, 400, closes",
            "closes",
            "the answers that are due: the first one is lost",
        ),
        rule(
            "Connection: close",
            format!("{get}Connection: close\r\n\r\n"),
            Another,
            "200 /a, closes",
            "200 /a, 200 /after, goes on",
            "a look at `Connection`",
        ),
        rule(
            "HTTP/1.0 without keep-alive",
            "GET /a HTTP/1.0\r\n\r\n".to_owned(),
            Another,
            "200 /a, closes",
            "200 /a, 200 /after, goes on",
            "a look at the version: an old client waits for the end",
        ),
        rule(
            "a panic of the service",
            "GET /panic HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(),
            Another,
            "500, closes",
            "500, 200 /after, goes on",
            "an end to the connection after a defect",
        ),
        rule(
            "a whole request from a client that ends its side",
            format!("{get}\r\n"),
            HalfClose,
            "200 /a, closes",
            "closes or 200 /a, closes",
            "half-close: where the end comes along with the request, the answer is lost",
        ),
        rule(
            "a body cut off by the end",
            format!("{post}Content-Length: 5\r\n\r\nab"),
            HalfClose,
            "closes",
            "closes",
            "",
        ),
        rule(
            "a body that stops coming",
            format!("{post}Content-Length: 5\r\n\r\nab"),
            Silence,
            "408, closes",
            "waits",
            "a deadline",
        ),
        rule(
            "a head that stops coming",
            "GET /a HT".to_owned(),
            Silence,
            "408, closes",
            "waits",
            "a deadline",
        ),
        rule(
            "an answer before a request that waits",
            format!("{get}\r\nGET /wait HTTP/1.1\r\nHost: h\r\n\r\n"),
            Another,
            "200 /a, waits",
            "waits",
            "the answer: it stays behind the wait of another request",
        ),
    ]
}
