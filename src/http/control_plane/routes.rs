//! What is served where. The router is built from this list and the OpenAPI document is tested
//! against it, so a route cannot be in one of them only.

use axum::handler::Handler;
use axum::routing::{self, MethodFilter, MethodRouter};

use super::{
    ControlPlane, dashboard, dead_letters, health, live, openapi, payments, profile, run_audit,
    skus,
};

/// One method on one path.
pub(super) struct Route {
    /// As HTTP writes it.
    pub(super) method: &'static str,
    /// With `{names}` for its variable segments.
    pub(super) path: &'static str,
    /// Whether it needs neither a token nor a session.
    pub(super) open: bool,
    /// Whether it ends when its client goes away, instead of being carried out.
    pub(super) ends_with_client: bool,
    /// What a request may bring along; anything, where it is not looked at.
    pub(super) takes: Option<Takes>,
    /// What answers.
    pub(super) serve: MethodRouter<ControlPlane>,
}

/// What a request may bring along; everything else is refused.
#[derive(Clone, Copy)]
pub(super) struct Takes {
    /// Its query parameters.
    pub(super) query: &'static [&'static str],
    /// Whether it has a body, which its handler reads. Else only `{}` passes.
    pub(super) body: bool,
}

const NOTHING: Takes = Takes {
    query: &[],
    body: false,
};

fn get<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "GET",
        path,
        open: false,
        ends_with_client: false,
        takes: Some(NOTHING),
        serve: routing::get(handler),
    }
}

fn post<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "POST",
        path,
        open: false,
        ends_with_client: false,
        takes: Some(NOTHING),
        serve: routing::post(handler),
    }
}

fn put<H: Handler<T, ControlPlane>, T: 'static>(path: &'static str, handler: H) -> Route {
    Route {
        method: "PUT",
        path,
        open: false,
        ends_with_client: false,
        takes: Some(NOTHING),
        serve: routing::on(MethodFilter::PUT, handler),
    }
}

fn open(route: Route) -> Route {
    Route {
        open: true,
        takes: None,
        ..route
    }
}

fn with_body(route: Route) -> Route {
    let takes = route.takes.map(|takes| Takes {
        body: true,
        ..takes
    });
    Route { takes, ..route }
}

fn with_query(query: &'static [&'static str], route: Route) -> Route {
    let takes = route.takes.map(|takes| Takes { query, ..takes });
    Route { takes, ..route }
}

fn ends_with_client(route: Route) -> Route {
    Route {
        ends_with_client: true,
        ..route
    }
}

/// Every route.
pub(super) fn routes() -> Vec<Route> {
    vec![
        open(get("/healthz", health::healthz)),
        open(get("/readyz", health::readyz)),
        open(get("/metrics", health::metrics)),
        // The page itself says nothing about the sale; without a session it is the login form.
        open(get("/", dashboard::page)),
        open(post("/login", dashboard::login)),
        open(post("/logout", dashboard::logout)),
        get("/openapi.json", openapi),
        get("/admin/v1/live", live::live),
        get("/admin/v1/skus", skus::list),
        with_body(put("/admin/v1/skus/{sku_id}", skus::put)),
        with_body(post("/admin/v1/skus/{sku_id}/restock", skus::restock)),
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
        with_body(post(
            "/admin/v1/orders/{order_id}/refunded",
            payments::refunded,
        )),
        ends_with_client(get("/admin/v1/audit", run_audit)),
        ends_with_client(with_query(
            &["seconds", "hz", "format"],
            get("/admin/v1/profile", profile::take),
        )),
    ]
}
