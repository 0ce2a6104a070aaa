//! The routes of the control plane. The router is built from their table and the OpenAPI document is
//! tested against it, so a route cannot be in one of them only.

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::handler::Handler;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{self, MethodFilter, MethodRouter};

use super::extract::{self, Accepts};
use super::failure::Failure;
use super::{
    ControlPlane, access, audit, dashboard, dead_letters, document, events, health, live, nodes,
    orders, payments, preflight, profile, skus,
};
use crate::http::problem::Problem;

/// Longest body of a request in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Serves every route of the table, and answers every other request with a problem.
pub fn router(plane: &ControlPlane) -> Router {
    let (mut open, mut finished, mut guarded) = (Router::new(), Router::new(), Router::new());
    for route in table() {
        let routes = match (route.open, route.ends_with_client) {
            (true, _) => &mut open,
            (false, false) => &mut finished,
            (false, true) => &mut guarded,
        };
        let mut serve = route.serve;
        if let Some(accepts) = route.accepts {
            serve = serve.route_layer(middleware::from_fn_with_state(accepts, extract::only));
        }
        *routes = std::mem::take(routes).route(route.path, serve);
    }
    let guard = middleware::from_fn_with_state(plane.clone(), access::authorize);
    // Innermost, so that it wraps only what is carried out.
    let finished = finished.route_layer(middleware::from_fn(run_to_the_end));
    open.merge(guarded.merge(finished).route_layer(guard))
        .fallback(|| async { Failure(Problem::new(404, "not_found", "nothing is here")) })
        .method_not_allowed_fallback(|| async {
            Failure(Problem::new(
                405,
                "method_not_allowed",
                "this method is not allowed here",
            ))
        })
        .layer(middleware::from_fn_with_state(
            plane.clone(),
            access::screen,
        ))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(plane.clone())
}

/// Method and path of every route of the control plane, as OpenAPI writes paths.
pub fn routes() -> Vec<(&'static str, &'static str)> {
    let routes = table().into_iter();
    routes.map(|route| (route.method, route.path)).collect()
}

/// Carries a request out even if its client goes away: an operator's change that stopped between
/// the database and memory would leave the two apart.
async fn run_to_the_end(request: Request, next: Next) -> Response {
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "a request to the control plane failed");
            Failure(Problem::internal()).into_response()
        }
    }
}

/// One method on one path.
struct Route {
    /// As HTTP writes it.
    method: &'static str,
    /// With `{names}` for its variable segments.
    path: &'static str,
    /// Whether it needs neither a token nor a session.
    open: bool,
    /// Whether it ends when its client goes away. Other requests are carried out to the end.
    ends_with_client: bool,
    /// The query fields and the body that it accepts; anything if `None`.
    accepts: Option<Accepts>,
    /// The handler.
    serve: MethodRouter<ControlPlane>,
}

/// No query field and no body.
const NOTHING: Accepts = Accepts {
    query: &[],
    body: false,
};

fn get<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "GET",
        path,
        open: false,
        ends_with_client: false,
        accepts: Some(NOTHING),
        serve: routing::get(handler),
    }
}

fn post<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "POST",
        path,
        open: false,
        ends_with_client: false,
        accepts: Some(NOTHING),
        serve: routing::post(handler),
    }
}

fn put<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "PUT",
        path,
        open: false,
        ends_with_client: false,
        accepts: Some(NOTHING),
        serve: routing::on(MethodFilter::PUT, handler),
    }
}

fn open(route: Route) -> Route {
    Route {
        open: true,
        accepts: None,
        ..route
    }
}

fn with_body(route: Route) -> Route {
    let accepts = route.accepts.map(|accepts| Accepts {
        body: true,
        ..accepts
    });
    Route { accepts, ..route }
}

fn with_query(query: &'static [&'static str], route: Route) -> Route {
    let accepts = route.accepts.map(|accepts| Accepts { query, ..accepts });
    Route { accepts, ..route }
}

fn ends_with_client(route: Route) -> Route {
    Route {
        ends_with_client: true,
        ..route
    }
}

/// Every route.
fn table() -> Vec<Route> {
    vec![
        open(get("/healthz", health::healthz)),
        open(get("/readyz", health::readyz)),
        open(get("/metrics", health::metrics)),
        // The page itself says nothing about the sale; without a session it is the login form.
        open(get("/", dashboard::page)),
        open(post("/login", dashboard::login)),
        open(post("/logout", dashboard::logout)),
        get("/openapi.json", document::get),
        get("/admin/v1/live", live::live),
        get("/admin/v1/skus", skus::list),
        with_body(put("/admin/v1/skus/{sku_id}", skus::put)),
        with_body(post("/admin/v1/skus/{sku_id}/restock", skus::restock)),
        with_body(post("/admin/v1/skus/{sku_id}/draw", skus::draw)),
        post("/admin/v1/skus/{sku_id}/pause", skus::pause),
        post("/admin/v1/skus/{sku_id}/resume", skus::resume),
        post("/admin/v1/pause", skus::pause_all),
        post("/admin/v1/resume", skus::resume_all),
        with_query(
            &["discarded", "limit"],
            get("/admin/v1/dead-letters", dead_letters::list),
        ),
        get("/admin/v1/dead-letters/{id}", dead_letters::get),
        post("/admin/v1/dead-letters/{id}/retry", dead_letters::retry),
        with_body(post(
            "/admin/v1/dead-letters/{id}/discard",
            dead_letters::discard,
        )),
        get("/admin/v1/nodes", nodes::list),
        post("/admin/v1/nodes/{node}/drain", nodes::drain),
        get("/admin/v1/events", events::list_sinks),
        with_query(
            &["after"],
            post("/admin/v1/events/{sink}/resync", events::resync),
        ),
        with_query(
            &["sink", "limit"],
            get("/admin/v1/event-dead-letters", events::list),
        ),
        post("/admin/v1/event-dead-letters/{id}/retry", events::retry),
        post("/admin/v1/event-dead-letters/{id}/discard", events::discard),
        with_query(
            &["state", "limit", "before"],
            get("/admin/v1/payments", payments::all),
        ),
        with_query(
            &["state", "limit", "before"],
            get("/admin/v1/orphan-payments", payments::orphans),
        ),
        get("/admin/v1/orphan-payments/{id}", payments::get),
        post("/admin/v1/orphan-payments/{id}/retry", payments::retry),
        with_body(post(
            "/admin/v1/orphan-payments/{id}/close",
            payments::close,
        )),
        get("/admin/v1/orders/{order_id}", orders::history),
        with_query(
            &["limit", "before"],
            get("/admin/v1/users/{user_id}/orders", orders::of_user),
        ),
        with_body(post(
            "/admin/v1/orders/{order_id}/refunded",
            payments::refunded,
        )),
        ends_with_client(get("/admin/v1/audit", audit::run)),
        // Carried out to the end, so that its scratch table is dropped.
        with_query(
            &["orders", "rate", "prepare"],
            post("/admin/v1/preflight", preflight::make),
        ),
        ends_with_client(with_query(
            &["seconds", "hz", "format"],
            get("/admin/v1/profile", profile::take),
        )),
    ]
}
