//! The table of routes: for each its method, its path, who may call it, one line that says what it does, and its handler.
//! The router and the OpenAPI document are both made of it.

use std::{any::type_name, sync::Arc};

use axum::{
    Router,
    handler::Handler,
    http::{Method, StatusCode},
    middleware,
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use shoal_client::types::ErrorBody;

use super::{
    access::{Access, guard},
    describe::{Documented, Operation},
    extract::bodiless,
    once,
};
use crate::state::Shared;

/// The statuses of refusals, all of one shape.
const REFUSALS: [u16; 12] = [400, 401, 403, 404, 408, 409, 413, 414, 422, 429, 500, 503];

/// One route.
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) access: Access,
    /// Its part of the OpenAPI document.
    operation: Value,
    /// Whether a request has a body.
    takes_body: bool,
    mount: MethodRouter<Arc<Shared>>,
}

/// All routes.
pub(super) struct Routes {
    pub(super) list: Vec<Route>,
    schemas: SchemaGenerator,
}

impl Routes {
    pub(super) fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Self { list: Vec::new(), schemas: settings.into_generator() }
    }

    /// A route that changes nothing.
    pub(super) fn get<H, M, T>(
        self,
        path: &'static str,
        access: Access,
        what: &'static str,
        handler: H,
    ) -> Self
    where
        H: Handler<M, Arc<Shared>> + Documented<T>,
        M: 'static,
    {
        self.add((Method::GET, MethodFilter::GET), path, access, what, handler)
    }

    /// A route that does something; for people it takes an idempotency key.
    pub(super) fn post<H, M, T>(
        self,
        path: &'static str,
        access: Access,
        what: &'static str,
        handler: H,
    ) -> Self
    where
        H: Handler<M, Arc<Shared>> + Documented<T>,
        M: 'static,
    {
        self.add((Method::POST, MethodFilter::POST), path, access, what, handler)
    }

    /// A route that sets something, as often as it comes.
    pub(super) fn put<H, M, T>(
        self,
        path: &'static str,
        access: Access,
        what: &'static str,
        handler: H,
    ) -> Self
    where
        H: Handler<M, Arc<Shared>> + Documented<T>,
        M: 'static,
    {
        self.add((Method::PUT, MethodFilter::PUT), path, access, what, handler)
    }

    /// A route that takes something away, as often as it comes.
    pub(super) fn delete<H, M, T>(
        self,
        path: &'static str,
        access: Access,
        what: &'static str,
        handler: H,
    ) -> Self
    where
        H: Handler<M, Arc<Shared>> + Documented<T>,
        M: 'static,
    {
        self.add((Method::DELETE, MethodFilter::DELETE), path, access, what, handler)
    }

    fn add<H, M, T>(
        mut self,
        (method, filter): (Method, MethodFilter),
        path: &'static str,
        access: Access,
        what: &'static str,
        handler: H,
    ) -> Self
    where
        H: Handler<M, Arc<Shared>> + Documented<T>,
        M: 'static,
    {
        let places = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let mut operation = Operation {
            places: places.map(String::from).collect(),
            parameters: Vec::new(),
            body: None,
            answers: Map::new(),
        };
        H::describe(&mut operation, &mut self.schemas);
        let takes_body = operation.body.is_some();
        let operation = finish(operation, &method, access, what, type_name::<H>());
        let mount = on(filter, handler);
        self.list.push(Route { method, path, access, operation, takes_body, mount });
        self
    }

    /// The OpenAPI document.
    pub(super) fn document(mut self) -> Value {
        let schema = self.schemas.subschema_for::<ErrorBody>();
        let responses = REFUSALS.into_iter().map(|status| {
            let reason = StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason());
            let content = json!({ "application/json": { "schema": schema } });
            (status.to_string(), json!({ "description": reason, "content": content }))
        });
        let responses: Map<String, Value> = responses.collect();
        let mut paths: Map<String, Value> = Map::new();
        for route in &self.list {
            let path = paths.entry(route.path).or_insert_with(|| json!({}));
            path[route.method.as_str().to_ascii_lowercase()] = route.operation.clone();
        }
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Shoal",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "The API of Shoal's coordinators. Errors are all of one shape (ErrorBody). Lists come \
                    in pages: give next_cursor as cursor to get the next one. Who may call what: viewer < deployer < \
                    admin; an operator's certificate counts as admin.",
                "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
            },
            "paths": paths,
            "components": {
                "schemas": self.schemas.definitions(),
                "responses": responses,
                "securitySchemes": {
                    "token": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "A token that shoal token create made.",
                    },
                    "certificate": {
                        "type": "mutualTLS",
                        "description": "A certificate of the cluster; of the role operator, where nothing else is said.",
                    },
                },
            },
        })
    }

    /// The router, each route behind its guard.
    pub(super) fn router(self, shared: &Arc<Shared>) -> Router<Arc<Shared>> {
        self.list.into_iter().fold(Router::new(), |router, route| {
            let mut mount = route.mount;
            if route.method != Method::GET && !route.takes_body {
                mount = mount.route_layer(middleware::from_fn(bodiless));
            }
            if takes_key(&route.method, route.access) {
                let layer = middleware::from_fn_with_state(shared.clone(), once::once);
                mount = mount.route_layer(layer);
            }
            let state = (shared.clone(), route.access);
            router
                .route(route.path, mount.route_layer(middleware::from_fn_with_state(state, guard)))
        })
    }
}

/// Whether a route takes an idempotency key: what a person or a script does. Workers and region processes have leases and
/// cursors for that.
fn takes_key(method: &Method, access: Access) -> bool {
    method == Method::POST && matches!(access, Access::Token(..))
}

/// The operation's part of the document.
fn finish(
    mut operation: Operation,
    method: &Method,
    access: Access,
    what: &str,
    handler: &str,
) -> Value {
    let mut names = handler.rsplit("::");
    let (name, group) = (names.next().unwrap_or_default(), names.next().unwrap_or_default());
    let (security, needs, mut refusals) = match access {
        Access::Open => (json!([]), "Needs no credential.".to_string(), vec![]),
        Access::Certificate(role) => (
            json!([{ "certificate": [] }]),
            format!("Needs a certificate of the role {role}."),
            vec![401, 403],
        ),
        Access::Token(role, _) => (
            json!([{ "token": [] }, { "certificate": [] }]),
            format!("Needs the role {role}."),
            vec![401, 403],
        ),
    };
    let is_open = access == Access::Open;
    if !operation.parameters.is_empty() || operation.body.is_some() {
        refusals.extend([400, 404, 414]);
    }
    if method != Method::GET {
        refusals.extend([400, 408, 413]);
    }
    if method != Method::GET {
        refusals.push(409);
    }
    if takes_key(method, access) {
        refusals.push(422);
        operation.parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "A random text: a request that comes again with it, by the same caller, is answered as \
                the first time and does nothing.",
            "schema": { "type": "string", "pattern": "^[!-~]{1,255}$" },
        }));
    }
    if !is_open {
        refusals.extend([500, 503]);
    }
    for status in refusals {
        let refusal = json!({ "$ref": format!("#/components/responses/{status}") });
        operation.answers.insert(status.to_string(), refusal);
    }
    let mut value = json!({
        "operationId": format!("{group}.{name}"),
        "tags": [group],
        "summary": what,
        "description": needs,
        "security": security,
        "responses": operation.answers,
    });
    if !operation.parameters.is_empty() {
        value["parameters"] = operation.parameters.into();
    }
    if let Some(body) = operation.body {
        value["requestBody"] = body;
    }
    value
}
