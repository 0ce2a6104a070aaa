//! From bytes to the head of a request and the extent of its body (RFC 9112). Pure: no I/O, no
//! state, no panic on any input, so it is what a fuzzer is pointed at.
//!
//! The rule behind every choice: if two readers of the same bytes could disagree on the end of a
//! request, refuse it (promise I9). `httparse` gives the grammar of a line; what it tolerates
//! beyond RFC 9112 is refused here.

use std::borrow::Cow;
use std::mem::MaybeUninit;

use httparse::Header;

use crate::http::server::limits::BodyLimits;

/// Header fields of one request at most; more are answered `431`.
pub const HEADERS_MAX: usize = 64;

/// Room for the header fields of one request, lent to [`parse`].
pub type HeaderSlots<'b> = [MaybeUninit<Header<'b>>; HEADERS_MAX];

/// An empty [`HeaderSlots`].
pub fn header_slots<'b>() -> HeaderSlots<'b> {
    [const { MaybeUninit::uninit() }; HEADERS_MAX]
}

/// The sizes, in bytes, beyond which a request is refused.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Request line and header fields.
    pub head_bytes_max: usize,
    /// The body, by target.
    pub bodies: BodyLimits,
}

/// The head of a request whose framing is beyond doubt.
#[derive(Debug)]
pub struct Head<'h, 'b> {
    /// The method as it came.
    pub method: &'b str,
    /// The target in origin form, or `*`.
    pub target: Cow<'b, str>,
    /// The header fields in order of arrival.
    pub headers: &'h [Header<'b>],
    /// Bytes from the start of the input to the end of the head.
    pub head_bytes: usize,
    /// Bytes of the body that follow the head.
    pub body_bytes: usize,
    /// Whether the version is HTTP/1.0, where a connection ends unless agreed otherwise.
    pub http_1_0: bool,
    /// Whether the connection may carry another request after this one.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// The bytes at hand, as far as they are a request.
#[derive(Debug)]
pub enum Parsed<'h, 'b> {
    /// The head is not complete yet, and nothing in it is wrong so far.
    Incomplete,
    /// The head is complete; the body may not be.
    Complete(Head<'h, 'b>),
    /// Not a request that can be served; where the next one would begin is unknown.
    Refused(FramingError),
}

/// Why bytes are refused as a request. The connection ends with the answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The request line or a field line does not follow the grammar.
    #[error("the request head is malformed")]
    Malformed,
    /// A line ends in a bare LF.
    #[error("a line of the head does not end in CRLF")]
    BareLineFeed,
    /// The version is not HTTP/1.0 or HTTP/1.1.
    #[error("only HTTP/1.0 and HTTP/1.1 are spoken here")]
    Version,
    /// The target is in none of the forms that apply to the method.
    #[error("the request target is not a path or an http URI")]
    Target,
    /// `Host` is missing on HTTP/1.1, present twice, or not a host.
    #[error("HTTP/1.1 needs exactly one valid Host field")]
    Host,
    /// `Content-Length` is repeated or not a plain number.
    #[error("Content-Length must be a single decimal number")]
    ContentLength,
    /// `Transfer-Encoding` together with `Content-Length`.
    #[error("Transfer-Encoding together with Content-Length is ambiguous")]
    AmbiguousLength,
    /// `Transfer-Encoding`, which is not implemented.
    #[error("Transfer-Encoding is not implemented; send a Content-Length")]
    TransferEncoding,
    /// An expectation other than `100-continue`.
    #[error("the only expectation that can be met is 100-continue")]
    Expectation,
    /// The head is larger than the limit or has too many fields.
    #[error("the request head is too large")]
    HeadTooLarge,
    /// The body is larger than the limit.
    #[error("the request body is too large")]
    BodyTooLarge,
}

impl FramingError {
    /// The status code of the answer.
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed
            | Self::BareLineFeed
            | Self::Target
            | Self::Host
            | Self::ContentLength
            | Self::AmbiguousLength => 400,
            Self::BodyTooLarge => 413,
            Self::Expectation => 417,
            Self::HeadTooLarge => 431,
            Self::TransferEncoding => 501,
            Self::Version => 505,
        }
    }

    /// The stable `code` of the problem document.
    pub fn code(self) -> &'static str {
        match self {
            Self::Malformed
            | Self::BareLineFeed
            | Self::Version
            | Self::Target
            | Self::Host
            | Self::ContentLength
            | Self::AmbiguousLength
            | Self::TransferEncoding
            | Self::Expectation => "bad_request",
            Self::HeadTooLarge => "head_too_large",
            Self::BodyTooLarge => "body_too_large",
        }
    }
}

/// Reads the head at the start of `input`.
pub fn parse<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    sizes: &Sizes,
) -> Parsed<'h, 'b> {
    match read_head(input, slots, sizes) {
        Ok(Some(head)) => Parsed::Complete(head),
        Ok(None) => Parsed::Incomplete,
        Err(error) => Parsed::Refused(error),
    }
}

fn read_head<'h, 'b>(
    input: &'b [u8],
    slots: &'h mut HeaderSlots<'b>,
    sizes: &Sizes,
) -> Result<Option<Head<'h, 'b>>, FramingError> {
    // Bytes beyond the limit must not matter, or the answer would depend on how the input was split
    // on its way.
    let input = input.get(..sizes.head_bytes_max).unwrap_or(input);
    let mut request = httparse::Request::new(&mut []);
    let parsed = request.parse_with_uninit_headers(input, slots);
    let head_bytes = match parsed {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) if input.len() >= sizes.head_bytes_max => {
            return Err(FramingError::HeadTooLarge);
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(FramingError::HeadTooLarge),
        Err(httparse::Error::Version) => return Err(FramingError::Version),
        Err(_) => return Err(FramingError::Malformed),
    };
    if has_bare_line_feed(input.get(..head_bytes).unwrap_or_default()) {
        return Err(FramingError::BareLineFeed);
    }
    let (Some(method), Some(raw_target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(FramingError::Malformed);
    };
    let http_1_0 = version == 0;
    let headers: &'h [Header<'b>] = request.headers;
    let fields = Fields::read(headers)?;
    // Checked first: an ambiguous length is the most dangerous fault.
    let declared = fields.body_bytes()?;
    match fields.host {
        Some(host) if is_host(host) => {}
        None if http_1_0 => {}
        _ => return Err(FramingError::Host),
    }
    let target = origin_form(method, raw_target)?;
    if declared > sizes.bodies.bytes_max(&target) {
        return Err(FramingError::BodyTooLarge);
    }
    // RFC 9110 10.1.1: an expectation in an HTTP/1.0 request is ignored.
    if fields.other_expectation && !http_1_0 {
        return Err(FramingError::Expectation);
    }
    Ok(Some(Head {
        method,
        target,
        headers,
        head_bytes,
        body_bytes: declared,
        http_1_0,
        keep_alive: !fields.close && (!http_1_0 || fields.keep_alive),
        expects_continue: fields.expects_continue && !http_1_0 && declared > 0,
    }))
}

/// Whether a complete head may have arrived at or after `from`: whether an empty line ends there.
///
/// Lets a reader of a head that trickles in skip the parse until it can succeed, so that the work
/// stays linear in the bytes. A bare LF counts as a line end here; `parse` refuses it afterwards.
pub fn may_be_complete(input: &[u8], from: usize) -> bool {
    // An empty line takes up to four bytes, of which three may have been there before.
    let tail = input.get(from.saturating_sub(3)..).unwrap_or_default();
    tail.iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .any(|(at, _)| matches!(tail.get(at + 1..), Some([b'\n', ..] | [b'\r', b'\n', ..])))
}

/// The fields that decide framing, gathered in one pass.
#[derive(Default)]
struct Fields<'b> {
    host: Option<&'b [u8]>,
    content_length: Option<&'b [u8]>,
    transfer_encoding: bool,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
    other_expectation: bool,
}

impl<'b> Fields<'b> {
    fn read(headers: &[Header<'b>]) -> Result<Self, FramingError> {
        let mut fields = Self::default();
        for header in headers {
            // The length of the name singles out the few that matter without comparing letters.
            match header.name.len() {
                4 if header.name.eq_ignore_ascii_case("host") => {
                    once(&mut fields.host, header.value, FramingError::Host)?;
                }
                6 if header.name.eq_ignore_ascii_case("expect") => {
                    for member in members(header.value) {
                        if member.eq_ignore_ascii_case(b"100-continue") {
                            fields.expects_continue = true;
                        } else {
                            fields.other_expectation = true;
                        }
                    }
                }
                10 if header.name.eq_ignore_ascii_case("connection") => {
                    for member in members(header.value) {
                        fields.close |= member.eq_ignore_ascii_case(b"close");
                        fields.keep_alive |= member.eq_ignore_ascii_case(b"keep-alive");
                    }
                }
                14 if header.name.eq_ignore_ascii_case("content-length") => {
                    once(
                        &mut fields.content_length,
                        header.value,
                        FramingError::ContentLength,
                    )?;
                }
                17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                    fields.transfer_encoding = true;
                }
                _ => {}
            }
        }
        Ok(fields)
    }

    /// The length of the body (RFC 9112 6.3); without a `Content-Length` there is none.
    fn body_bytes(&self) -> Result<usize, FramingError> {
        match (self.transfer_encoding, self.content_length) {
            (true, Some(_)) => Err(FramingError::AmbiguousLength),
            (true, None) => Err(FramingError::TransferEncoding),
            (false, None) => Ok(0),
            (false, Some(digits)) => decimal(digits).ok_or(FramingError::ContentLength),
        }
    }
}

/// Keeps the value of a field that may occur once.
fn once<'b>(
    place: &mut Option<&'b [u8]>,
    value: &'b [u8],
    error: FramingError,
) -> Result<(), FramingError> {
    match place.replace(trim(value)) {
        None => Ok(()),
        Some(_) => Err(error),
    }
}

/// `1*DIGIT`. A number beyond `usize` saturates: it is valid, and over every limit.
fn decimal(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0usize, |number, byte| {
        byte.is_ascii_digit().then(|| {
            number
                .saturating_mul(10)
                .saturating_add(usize::from(byte - b'0'))
        })
    })
}

fn trim(value: &[u8]) -> &[u8] {
    value.trim_ascii()
}

/// The members of a comma-separated list, without the empty ones (RFC 9110 5.6.1).
fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(trim)
        .filter(|member| !member.is_empty())
}

fn has_bare_line_feed(head: &[u8]) -> bool {
    // Counted without an early exit so that the loop vectorises: a bad head is the rare case.
    let bare = head
        .iter()
        .zip(head.get(1..).unwrap_or_default())
        .filter(|(before, byte)| (**byte == b'\n') & (**before != b'\r'))
        .count();
    bare != 0 || head.first() == Some(&b'\n')
}

/// `uri-host [":" port]`, by its alphabet; an empty one is allowed (RFC 9110 7.2).
fn is_host(host: &[u8]) -> bool {
    host.iter().all(|byte| {
        byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'%'
                    | b':'
                    | b'['
                    | b']'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b','
                    | b';'
                    | b'='
            )
    })
}

/// Reduces a target to origin form (RFC 9112 3.2); `*` stays for `OPTIONS`.
fn origin_form<'b>(method: &str, target: &'b str) -> Result<Cow<'b, str>, FramingError> {
    if !target
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'#')
    {
        return Err(FramingError::Target);
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(Cow::Borrowed(target));
    }
    let (scheme, rest) = target.split_once("://").ok_or(FramingError::Target)?;
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err(FramingError::Target);
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority.is_empty() || !is_host(authority.as_bytes()) {
        return Err(FramingError::Target);
    }
    Ok(match path.as_bytes().first() {
        None => Cow::Borrowed("/"),
        Some(b'/') => Cow::Borrowed(path),
        Some(_) => Cow::Owned(format!("/{path}")),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http::server::limits::{BodyRule, Targets};

    const SIZES: Sizes = Sizes {
        head_bytes_max: 1024,
        bodies: BodyLimits {
            bytes_max: 100,
            rules: &[BodyRule {
                targets: Targets::Exactly("/batch"),
                bytes_max_least: 1000,
                is_anonymous: false,
            }],
        },
    };

    fn refusal(input: &[u8]) -> Option<FramingError> {
        let mut slots = header_slots();
        match parse(input, &mut slots, &SIZES) {
            Parsed::Refused(error) => Some(error),
            Parsed::Complete(_) | Parsed::Incomplete => None,
        }
    }

    fn with_head<T>(input: &[u8], look: impl FnOnce(&Head<'_, '_>) -> T) -> T {
        let mut slots = header_slots();
        match parse(input, &mut slots, &SIZES) {
            Parsed::Complete(head) => look(&head),
            other => panic!("not complete: {other:?}"),
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        use FramingError as E;
        let cases: &[(&str, FramingError)] = &[
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
                E::ContentLength,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n",
                E::BodyTooLarge,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
                E::TransferEncoding,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n",
                E::TransferEncoding,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: x\r\nContent-Length: 0\r\n\r\n",
                E::AmbiguousLength,
            ),
            ("GET / HTTP/1.1\r\n\r\n", E::Host),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", E::Host),
            ("GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", E::Host),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", E::Host),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", E::Host),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", E::Malformed),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
                E::Malformed,
            ),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", E::Malformed),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n", E::Malformed),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n", E::Malformed),
            ("GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", E::Malformed),
            ("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", E::Malformed),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", E::Malformed),
            ("GET /\r\n\r\n", E::Malformed),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", E::BareLineFeed),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", E::BareLineFeed),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", E::BareLineFeed),
            ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", E::BareLineFeed),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", E::Version),
            ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET http://u@a/x HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            ("GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", E::Target),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n",
                E::Expectation,
            ),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n",
                E::BodyTooLarge,
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(refusal(input.as_bytes()), Some(*expected), "{input:?}");
        }
    }

    #[test]
    fn targets_are_reduced_to_origin_form() {
        for (target, expected) in [
            ("/a?b=c", "/a?b=c"),
            ("http://h", "/"),
            ("HTTP://h:1/a/b?c", "/a/b?c"),
            ("https://h?c", "/?c"),
            ("http://[::1]:80/a", "/a"),
            ("//x", "//x"),
        ] {
            let input = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            with_head(input.as_bytes(), |head| assert_eq!(head.target, expected));
        }
        with_head(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", |head| {
            assert_eq!(head.target, "*");
        });
    }

    #[test]
    fn keep_alive_follows_the_version_and_the_connection_field() {
        for (version, connection, expected) in [
            ("1.1", "x", true),
            ("1.1", "close", false),
            ("1.1", "foo, CLOSE", false),
            ("1.1", "keep-alive", true),
            ("1.0", "x", false),
            ("1.0", "Keep-Alive", true),
            ("1.0", "keep-alive, close", false),
        ] {
            let input =
                format!("GET / HTTP/{version}\r\nHost: a\r\nConnection: {connection}\r\n\r\n");
            with_head(input.as_bytes(), |head| {
                assert_eq!(head.keep_alive, expected, "{version} {connection}");
            });
        }
    }

    #[test]
    fn a_target_with_a_rule_has_the_larger_body() {
        let head = "POST /batch HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n";
        with_head(head.as_bytes(), |head| assert_eq!(head.body_bytes, 1000));
        let over = head.replace("1000", "1001");
        assert_eq!(refusal(over.as_bytes()), Some(FramingError::BodyTooLarge));
    }

    #[test]
    fn a_head_over_its_limit_is_refused_before_and_after_it_ends() {
        let long = format!(
            "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
            "x".repeat(1024)
        );
        assert_eq!(refusal(long.as_bytes()), Some(FramingError::HeadTooLarge));
        let unfinished = &long.as_bytes()[..1024];
        assert_eq!(refusal(unfinished), Some(FramingError::HeadTooLarge));
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: 1\r\n".repeat(64));
        assert_eq!(refusal(many.as_bytes()), Some(FramingError::HeadTooLarge));
        let enough = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: 1\r\n".repeat(63));
        with_head(enough.as_bytes(), |head| assert_eq!(head.headers.len(), 64));
    }

    #[test]
    fn a_head_that_trickles_in_is_found_complete_at_its_last_byte() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for arrived in 0..=head.len() {
            let found = (0..=arrived).all(|from| {
                // Whatever was looked at before, the end is seen once it is there.
                arrived < head.len() || from == arrived || may_be_complete(&head[..arrived], from)
            });
            assert!(found, "{arrived}");
            assert_eq!(may_be_complete(&head[..arrived], 0), arrived == head.len());
        }
    }

    proptest! {
        #[test]
        fn no_input_panics_and_no_head_reaches_beyond_it(
            input in proptest::collection::vec(
                prop_oneof![
                    any::<u8>().prop_map(|byte| vec![byte]),
                    prop::sample::select(vec![
                        "GET ", "/", " HTTP/1.1", "\r\n", "Host: a", "Content-Length: ", "5",
                        "Transfer-Encoding: chunked", ":", "\n", "\0", "Expect: 100-continue",
                        "http://a", " ",
                    ]).prop_map(|part| part.as_bytes().to_vec()),
                ],
                0..60,
            ).prop_map(|parts| parts.concat())
        ) {
            let mut slots = header_slots();
            let _ = may_be_complete(&input, input.len() / 2);
            if let Parsed::Complete(head) = parse(&input, &mut slots, &SIZES) {
                prop_assert!(head.head_bytes <= input.len());
                prop_assert!(input[..head.head_bytes].ends_with(b"\r\n\r\n"));
                prop_assert!(may_be_complete(&input, 0));
            }
        }
    }
}
