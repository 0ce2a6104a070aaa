//! The routes of the data plane: authorizes a request, finds its handler, writes its problem.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::context::Context;
use super::nodes::{self, Origin};
use super::payments::notify;
use super::payments::providers::{PaymentProvider, Providers};
use super::{draws, orders, skus};
use crate::http::message::{Request, Response};
use crate::http::origin::SiteFields;
use crate::http::peers::Hint;
use crate::http::peers::server::{PeerService, Terms};
use crate::http::problem::Problem;
use crate::http::server::Service;
use crate::http::server::limits::{BodyRule, Targets};
use crate::http::tokens::Tokens;
use crate::http::wire::{no_members, query, require_identity};
use crate::order::payment::Provider;
use crate::order::{OrderId, SkuId, UserId};
use crate::spans::{RequestSpan, Spans, TraceFields};

const ORDERS_PATH: &str = "/v1/orders";
const BATCH_PATH: &str = "/v1/orders:batch";
/// Not among [`ROUTES`]: a single node has none.
const LANES_PATH: &str = "/v1/lanes";
/// The targets of payment platforms begin with this.
const PAYMENTS_PATH: &str = "/v1/payments/";

/// Method and path of every route of the data plane, as OpenAPI writes paths. `Route::find` knows
/// the same ones; `tests/service/openapi.rs` asks for each.
pub const ROUTES: [(&str, &str); 8] = [
    ("POST", ORDERS_PATH),
    ("POST", BATCH_PATH),
    ("GET", "/v1/orders/{order_id}"),
    ("POST", "/v1/orders/{order_id}/cancel"),
    ("GET", "/v1/users/{user_id}/orders"),
    ("GET", "/v1/skus/{sku_id}"),
    ("GET", "/v1/skus/{sku_id}/draw"),
    ("POST", "/v1/payments/{provider}/notify"),
];

/// The routes whose bodies may be larger than `data_plane.body_bytes_max`.
pub const BODY_RULES: &[BodyRule] = &[
    BodyRule {
        targets: Targets::Exactly(BATCH_PATH),
        bytes_max_least: 2 * 1024 * 1024,
        is_anonymous: false,
    },
    // Refusing a message for its length would cost a payment. Stripe's metadata alone may be 27 KB.
    BodyRule {
        targets: Targets::Below(PAYMENTS_PATH),
        bytes_max_least: 64 * 1024,
        is_anonymous: true,
    },
];

/// The data plane as a [`Service`].
pub struct Router {
    context: Context,
    providers: Providers,
    tokens: Tokens,
    /// Whether requests without a token may name any host, not only this machine.
    trust_network: bool,
    /// If requests are traced.
    spans: Option<Spans>,
}

impl Router {
    /// A router whose handlers work with `context`.
    ///
    /// `providers`: the payment platforms whose callbacks are accepted. `tokens`: the bearer tokens
    /// of the shop. `trust_network`: `data_plane.trust_network`.
    pub fn new(
        context: Context,
        providers: Providers,
        tokens: Tokens,
        trust_network: bool,
    ) -> Self {
        Router {
            context,
            providers,
            tokens,
            trust_network,
            spans: None,
        }
    }

    /// The same with requests traced.
    pub fn with_spans(self, spans: Option<Spans>) -> Self {
        Router { spans, ..self }
    }

    /// From now on requests that wait for an undecided order are answered at once.
    pub fn stop_waiting(&self) {
        self.context.stopping.store(true, Ordering::Release);
    }

    /// Returns the code of the problem that it answers with.
    fn answer(
        &self,
        request: &Request<'_>,
        origin: Origin,
        response: &mut Response,
    ) -> Option<&'static str> {
        let problem = self.route(request, origin, response).err()?;
        self.count_refusal(&problem);
        problem.write_to(response);
        Some(problem.code)
    }

    /// The same with the span of the request, if it has one.
    fn answer_traced(&self, request: &Request<'_>, origin: Origin, response: &mut Response) {
        let Some(span) = self.span(request, origin) else {
            self.answer(request, origin, response);
            return;
        };
        let traced = Request {
            trace: Some(span.trace()),
            ..*request
        };
        let code = self.answer(&traced, origin, response);
        let route = template(request.path());
        span.end(request.method, route, response.status(), code);
    }

    /// Begins the span of a request, if requests are traced and it is sampled. Anybody may send a callback, so its sender
    /// has no say in that. The node that passes a request on has decided, and names its own span if it is sampled.
    fn span(&self, request: &Request<'_>, origin: Origin) -> Option<RequestSpan> {
        let spans = self.spans.as_ref()?;
        let fields = match (provider_word(request.path()), origin) {
            (Some(_), Origin::Client) => TraceFields::default(),
            _ => request.trace_fields(),
        };
        if matches!(origin, Origin::Node(_)) && fields.parent.is_none() {
            return None;
        }
        spans.request(&fields)
    }

    fn check_head(&self, head: &Request<'_>) -> Result<(), Problem> {
        let path = head.path();
        // A payment platform has no token: it signs its message, which is verified as a whole.
        if let Some(word) = provider_word(path) {
            return self.provider(path, word).map(|_| ());
        }
        if !self.tokens.is_open() {
            return match self.tokens.allow(head.header("authorization")) {
                true => Ok(()),
                false => Err(Problem::unauthorized()),
            };
        }
        let site = SiteFields {
            host: head.header("host"),
            origin: head.header("origin"),
            sec_fetch_site: head.header("sec-fetch-site"),
        };
        if !self.trust_network {
            site.check_host()?;
        }
        if head.method != "GET" {
            site.check_site()?;
        }
        Ok(())
    }

    fn route(
        &self,
        request: &Request<'_>,
        origin: Origin,
        response: &mut Response,
    ) -> Result<(), Problem> {
        let path = request.path();
        let context = &self.context;
        // A callback is stored where it comes in.
        if let (Some(word), Origin::Client) = (provider_word(path), origin) {
            let provider = self.provider(path, word)?;
            allow(request, response, "POST")?;
            notify::notify(context, request, response, provider);
            return Ok(());
        }
        require_identity(request.header_values("content-encoding")).inspect_err(|_| {
            // RFC 9110 15.5.16: names the encodings that the client may retry with.
            response.header("Accept-Encoding", "identity");
        })?;
        let is_there =
            |route: &Route| !matches!(route, Route::ReadLanes) || context.nodes.is_some();
        let route = Route::find(path).filter(is_there);
        let route = route.ok_or_else(|| not_found(path))?;
        allow(request, response, route.method())?;
        query::only(request.query(), route.query_fields())?;
        match route {
            Route::CreateOrder => orders::create::one(context, request, origin, response),
            Route::CreateOrders => orders::batch::batch(context, request, origin, response),
            Route::ReadOrder(id) => orders::read::one(context, request, origin, response, id),
            Route::CancelOrder(id) => {
                no_members(request.body)?;
                orders::cancel::cancel(context, request, origin, response, id)
            }
            Route::ReadOrders(user_id) => {
                orders::read::list(context, request, origin, response, user_id)
            }
            Route::ReadSku(id) => skus::get(context, response, &id),
            Route::ReadDraw(id) => draws::page(context, request, response, id),
            Route::ReadLanes => nodes::lanes::get(context.nodes.as_ref(), response),
        }
    }

    fn provider(&self, path: &str, word: &str) -> Result<&dyn PaymentProvider, Problem> {
        let known = Provider::from_word(word).ok_or_else(|| not_found(path))?;
        self.providers.get(known).ok_or_else(|| {
            // Anyone may cause it; the log limits lines by kind.
            tracing::warn!(
                setting = format_args!("payments.{known}"),
                "a payment callback was answered 404: its provider is not configured"
            );
            not_found(path)
        })
    }

    fn count_refusal(&self, problem: &Problem) {
        let unknown = &self.context.metrics.unknown;
        match problem.code {
            "unknown_order" => unknown.count("order"),
            "unknown_sku" => unknown.count("sku"),
            "not_found" => unknown.count("other"),
            _ => {}
        }
    }
}

impl Service for Router {
    fn authorize(&self, head: &Request<'_>) -> Result<(), Problem> {
        self.check_head(head)
            .inspect_err(|problem| self.count_refusal(problem))
    }

    fn call(&self, request: &Request<'_>, response: &mut Response) {
        self.answer_traced(request, Origin::Client, response);
    }
}

/// The end of a link: requests that another node has authorized.
impl PeerService for Arc<Router> {
    fn call(&self, request: &Request<'_>, terms: Terms, response: &mut Response) {
        self.answer_traced(request, Origin::Node(terms), response);
    }

    fn hint(&self, from: u8, hint: Hint) {
        match hint {
            Hint::Payment(_) => self.context.callbacks.look_for_orphans(),
            Hint::PaymentArrives(id, paid_at) => self.context.callbacks.expect(id, paid_at),
            Hint::LanesMoved | Hint::Terms | Hint::Want(_) => {}
        }
        if let Some(nodes) = &self.context.nodes {
            (nodes.on_hint)(from, hint);
        }
    }
}

/// A route for clients with a token, with the variable parts of its path.
enum Route {
    CreateOrder,
    CreateOrders,
    ReadOrder(OrderId),
    CancelOrder(OrderId),
    ReadOrders(UserId),
    ReadSku(SkuId),
    ReadDraw(SkuId),
    /// Only in a cluster.
    ReadLanes,
}

impl Route {
    /// The route at `path`, if there is one and its variable part is valid.
    fn find(path: &str) -> Option<Self> {
        match path {
            ORDERS_PATH => return Some(Route::CreateOrder),
            BATCH_PATH => return Some(Route::CreateOrders),
            LANES_PATH => return Some(Route::ReadLanes),
            _ => {}
        }
        match path.strip_prefix("/v1/")?.split_once('/')? {
            ("orders", rest) => match rest.split_once('/') {
                None => OrderId::parse(rest).map(Route::ReadOrder),
                Some((id, "cancel")) => OrderId::parse(id).map(Route::CancelOrder),
                Some(_) => None,
            },
            ("users", rest) => {
                let user = percent_decoded(rest.strip_suffix("/orders")?)?;
                UserId::new(&user).ok().map(Route::ReadOrders)
            }
            ("skus", rest) => {
                let (id, route): (_, fn(SkuId) -> Route) = match rest.split_once('/') {
                    None => (rest, Route::ReadSku),
                    Some((id, "draw")) => (id, Route::ReadDraw),
                    Some(_) => return None,
                };
                SkuId::new(&percent_decoded(id)?).ok().map(route)
            }
            _ => None,
        }
    }

    fn method(&self) -> &'static str {
        match self {
            Route::CreateOrder | Route::CreateOrders | Route::CancelOrder(_) => "POST",
            Route::ReadOrder(_)
            | Route::ReadOrders(_)
            | Route::ReadSku(_)
            | Route::ReadDraw(_)
            | Route::ReadLanes => "GET",
        }
    }

    /// The query fields that it knows; others are refused.
    fn query_fields(&self) -> &'static [&'static str] {
        match self {
            Route::ReadOrder(_) => &["wait"],
            Route::ReadOrders(_) => &["limit", "before"],
            Route::ReadDraw(_) => &["limit", "after"],
            Route::CancelOrder(_) => &["only"],
            Route::CreateOrder | Route::CreateOrders | Route::ReadSku(_) | Route::ReadLanes => &[],
        }
    }
}

/// The path of the route at `path`, as OpenAPI writes it.
fn template(path: &str) -> &'static str {
    if provider_word(path).is_some() {
        return "/v1/payments/{provider}/notify";
    }
    match Route::find(path) {
        Some(Route::CreateOrder) => ORDERS_PATH,
        Some(Route::CreateOrders) => BATCH_PATH,
        Some(Route::ReadOrder(_)) => "/v1/orders/{order_id}",
        Some(Route::CancelOrder(_)) => "/v1/orders/{order_id}/cancel",
        Some(Route::ReadOrders(_)) => "/v1/users/{user_id}/orders",
        Some(Route::ReadSku(_)) => "/v1/skus/{sku_id}",
        Some(Route::ReadDraw(_)) => "/v1/skus/{sku_id}/draw",
        Some(Route::ReadLanes) => LANES_PATH,
        None => "unknown",
    }
}

/// The provider in the path of a callback; `None` for every other path.
fn provider_word(path: &str) -> Option<&str> {
    path.strip_prefix(PAYMENTS_PATH)?.strip_suffix("/notify")
}

fn not_found(path: &str) -> Problem {
    Problem::new(404, "not_found", format!("nothing is at {path}"))
}

/// A segment of a path with its percent-encoding undone (RFC 3986 2.1).
fn percent_decoded(segment: &str) -> Option<Cow<'_, str>> {
    percent_encoding::percent_decode_str(segment)
        .decode_utf8()
        .ok()
}

/// Refuses every method but `method`. `HEAD` comes as `GET`.
fn allow(
    request: &Request<'_>,
    response: &mut Response,
    method: &'static str,
) -> Result<(), Problem> {
    if request.method == method {
        return Ok(());
    }
    response.header("Allow", if method == "GET" { "GET, HEAD" } else { method });
    Err(Problem::new(
        405,
        "method_not_allowed",
        format!("{} is not allowed here", request.method),
    ))
}
