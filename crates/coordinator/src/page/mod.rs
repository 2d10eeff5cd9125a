//! The page: the coordinator in a browser, for those who would rather look than type.
//!
//! Its HTML is made here, for each request, of what the API answers; it works without scripts, and one small script keeps it
//! up to date (`static/page.js`). It has no rules of its own: whatever it shows or does, it asks the API in this
//! process with the token of who looks (`call`), through the same door as everybody, so roles, apps, idempotency keys and
//! the audit log are the API's. Which buttons are shown, it looks up in the API's table of routes. A login is a token,
//! sealed into a cookie (`session`).

mod apps;
mod builds;
mod call;
mod copies;
mod history;
mod html;
mod rollouts;
mod session;

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Form, Router,
    body::Body,
    extract::{
        ConnectInfo, DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State,
    },
    http::{HeaderValue, Method, StatusCode, Uri, header, request::Parts},
    middleware::{self, Next},
    response::{Html, IntoResponse, Redirect, Response},
    routing::{get, post},
};
use futures::FutureExt as _;
use maud::{Markup, html};
use serde::Deserialize;
use shoal_client::types::WhoAmI;
use shoal_process::Caller;
use shoal_proto::AppName;

use self::{
    call::{Api, Refusal},
    session::Session,
};
use crate::{RouteInfo, api, state::Shared};

/// The longest form, in bytes: a commit, a name, a token.
const FORM_MAX_BYTES: usize = 16 << 10;

/// How many rows a view's list has.
const ROWS: u32 = 25;

/// Nothing but what this coordinator itself serves, no script or style within a page, and in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// What the views share.
struct Desk {
    shared: Arc<Shared>,
    /// The API, called within the process.
    api: Router,
    /// Who may call each of its routes.
    routes: Vec<RouteInfo>,
}

type Page = State<Arc<Desk>>;

/// A view, or why there is none.
type Shown = Result<Response, Refusal>;

/// The page, and behind it the API.
pub(crate) fn router(shared: Arc<Shared>, api: Router) -> Router {
    let desk = Arc::new(Desk { shared, api: api.clone(), routes: api::table() });
    Router::new()
        .route("/", get(apps::list))
        .route("/apps/{app}", get(apps::one).post(apps::act))
        .route("/builds", get(builds::list))
        .route("/jobs/{job}", get(builds::one).post(builds::act))
        .route("/jobs/{job}/log", get(builds::log))
        .route("/rollouts/{rollout}", get(rollouts::one).post(rollouts::act))
        .route("/copies", get(copies::list))
        .route("/history", get(history::list))
        .route("/live", get(events))
        .route("/login", get(login_form).post(login))
        .route("/logout", post(logout))
        .route("/static/page.css", get(|| file("text/css", include_str!("static/page.css"))))
        .route("/static/page.js", get(|| file("text/javascript", include_str!("static/page.js"))))
        .route("/static/icon.svg", get(|| file("image/svg+xml", include_str!("static/icon.svg"))))
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(FORM_MAX_BYTES))
        .layer(middleware::from_fn(guard))
        .with_state(desk)
        .fallback_service(api)
}

/// Puts around every view what keeps browsers strict, and answers one that panics.
async fn guard(request: Request, next: Next) -> Response {
    let done = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = done.unwrap_or_else(|_| {
        let text = "this view failed: the coordinator's log says why";
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
    });
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // What one person may see is kept in no cache.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

async fn wrong_method(request: Request) -> Refusal {
    let text = format!("{} is not possible on {}", request.method(), request.uri().path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
}

async fn file(kind: &'static str, content: &'static str) -> Response {
    // Small, and new with a new release: asked for again after a minute.
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "max-age=60")];
    (headers, content).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        if self.status == StatusCode::UNAUTHORIZED {
            let mut response = login_page(self.status, Some(&self.message), "/");
            response.headers_mut().insert(header::SET_COOKIE, session::no_cookie());
            return response;
        }
        let title = self.status.canonical_reason().unwrap_or("Refused");
        let content = html! {
            h1 { (title) }
            (html::wrong(Some(&self.message)))
            p { a href="/" { "To the apps" } }
        };
        (self.status, html::page(title, None, &content)).into_response()
    }
}

/// Who looks at a view.
struct Visit {
    session: Session,
    who: WhoAmI,
    api: Api,
    /// New with each view that is shown: what is done twice from the same view is done once.
    key: String,
    desk: Arc<Desk>,
}

impl Visit {
    /// Whether a call of the API is for them, by the API's own table; of an app, if it is about one.
    fn may(&self, method: &Method, path: &str, app: Option<&AppName>) -> bool {
        let route = self.desk.routes.iter().find(|r| r.method == method.as_str() && r.path == path);
        let role = route.and_then(|route| Some((route.role?, route.fleet)));
        role.is_some_and(|(role, fleet)| {
            let of_app = self
                .who
                .apps
                .as_ref()
                .is_none_or(|apps| !fleet && app.is_none_or(|app| apps.contains(app)));
            self.who.role >= role && of_app
        })
    }

    /// What is shown to them.
    fn shown(&self, status: StatusCode, title: &str, content: &Markup) -> Response {
        (status, html::page(title, Some(self), content)).into_response()
    }
}

/// Sends whoever is not logged in to the login, and back from there.
fn to_login(uri: &Uri) -> Response {
    let back = uri.path_and_query().map_or("/", |path| path.as_str());
    let query: String = back.bytes().map(|b| format!("%{b:02X}")).collect();
    Redirect::to(&format!("/login?to={query}")).into_response()
}

async fn visit(parts: &mut Parts, desk: &Arc<Desk>) -> Result<Visit, Response> {
    let Some(session) = Session::of(&desk.shared.secrets, &parts.headers) else {
        let uri = &parts.uri;
        // A strict cookie stays away from whoever comes by a link elsewhere: from our own page it comes along.
        if parts.method == Method::GET && session::is_of_another_site(&parts.headers) {
            return Err(again(uri));
        }
        return Err(to_login(uri));
    };
    let from = parts.extensions.get::<ConnectInfo<Caller>>().map(|ConnectInfo(from)| from);
    let api = Api::new(desk.api.clone(), session.token.clone(), from);
    let who = api.get("/v1/whoami").await.map_err(IntoResponse::into_response)?;
    let internal = |text| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text).into_response();
    let key = session::random_word().map_err(internal)?;
    Ok(Visit { session, who, api, key, desk: desk.clone() })
}

/// Loads the same page once more, now from here.
fn again(uri: &Uri) -> Response {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let page = html! {
        (maud::DOCTYPE)
        html lang="en" {
            head { title { "Shoal" } meta http-equiv="refresh" content=(format!("0;url={path}")); }
            body { a href=(path) { "Go on" } }
        }
    };
    Html(page.into_string()).into_response()
}

impl FromRequestParts<Arc<Desk>> for Visit {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, desk: &Arc<Desk>) -> Result<Self, Response> {
        visit(parts, desk).await
    }
}

/// The path's variable.
struct Place<T>(T);

impl<T: serde::de::DeserializeOwned + Send> FromRequestParts<Arc<Desk>> for Place<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, desk: &Arc<Desk>) -> Result<Self, Refusal> {
        let path = Path::<T>::from_request_parts(parts, desk).await;
        let wrong = |error: axum::extract::rejection::PathRejection| {
            Refusal::new(StatusCode::NOT_FOUND, error.body_text())
        };
        path.map(|Path(place)| Self(place)).map_err(wrong)
    }
}

/// Which rows of a list are looked at.
#[derive(Deserialize, Default)]
struct Rows {
    cursor: Option<String>,
    app: Option<AppName>,
}

impl Rows {
    /// The call of the API for them.
    fn of(&self, list: &str) -> String {
        let mut path = format!("{list}?limit={ROWS}");
        // A cursor that the API gave is of letters and digits; another one it would refuse, too.
        let cursor = self.cursor.as_ref().filter(|text| {
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        });
        for (name, value) in [
            ("app", self.app.as_ref().map(AppName::as_str)),
            ("cursor", cursor.map(String::as_str)),
        ] {
            if let Some(value) = value {
                path += &format!("&{name}={value}");
            }
        }
        path
    }
}

/// What a form says.
#[derive(Deserialize)]
struct Fields {
    word: String,
    key: String,
    #[serde(default)]
    r#do: String,
    commit: Option<String>,
    artifact: Option<String>,
}

/// A button that was pressed.
struct Pressed {
    visit: Visit,
    fields: Fields,
}

impl FromRequest<Arc<Desk>> for Pressed {
    type Rejection = Response;

    async fn from_request(request: Request, desk: &Arc<Desk>) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        if session::is_of_another_site(&parts.headers) {
            return Err(foreign());
        }
        let visit = visit(&mut parts, desk).await?;
        let request = Request::from_parts(parts, body);
        let Form(fields) = form::<Fields>(request).await?;
        if !visit.session.says(&fields.word) {
            return Err(foreign());
        }
        Ok(Self { visit, fields })
    }
}

async fn form<T: serde::de::DeserializeOwned>(request: Request) -> Result<Form<T>, Response> {
    Form::<T>::from_request(request, &()).await.map_err(|error| {
        Refusal::new(error.status(), format!("this form cannot be read: {error}")).into_response()
    })
}

fn foreign() -> Response {
    let text =
        "this form is none of your session's: load the page again and press the button there";
    Refusal::new(StatusCode::FORBIDDEN, text).into_response()
}

impl Pressed {
    /// The key of what is done: of this view, this action and what it is done to.
    fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let fields = &self.fields;
        let parts = [
            Some(&fields.key),
            Some(&fields.r#do),
            fields.commit.as_ref(),
            fields.artifact.as_ref(),
        ];
        for part in parts.into_iter().flatten() {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        format!("page-{}", hasher.finalize().to_hex())
    }
}

/// What happens, as the API streams it: the script looks anew at each.
async fn events(visit: Visit, Query(rows): Query<Rows>) -> Shown {
    let app = rows.app.map_or(String::new(), |app| format!("?app={app}"));
    visit.api.send(Method::GET, &format!("/v1/events{app}"), None, Body::empty()).await
}

#[derive(Deserialize)]
struct LoginArgs {
    to: Option<String>,
}

fn login_page(status: StatusCode, wrong: Option<&str>, to: &str) -> Response {
    let content = html! {
        h1 { "Log in" }
        (html::wrong(wrong))
        form .login method="post" action="/login" {
            // Password managers keep a token under a name.
            input type="text" name="user" value="token" autocomplete="username" hidden;
            label for="token" { "Token" }
            input #token name="token" type="password" required autocomplete="current-password" spellcheck="false"
                autofocus placeholder="shoal_…" aria-describedby="token-help";
            p #token-help .help { "A token that " code { "shoal token create" } " made. It decides what you see and may do." }
            input type="hidden" name="to" value=(to);
            button { "Log in" }
        }
    };
    (status, html::page("Log in", None, &content)).into_response()
}

/// A place on this page, whatever a link says.
fn local(to: Option<String>) -> String {
    let is_local = |to: &String| {
        to.starts_with('/')
            && !to.starts_with("//")
            && to.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
            && !to.starts_with("/log")
    };
    to.filter(is_local).unwrap_or_else(|| "/".into())
}

async fn login_form(Query(args): Query<LoginArgs>) -> Response {
    login_page(StatusCode::OK, None, &local(args.to))
}

#[derive(Deserialize)]
struct Login {
    token: String,
    to: Option<String>,
}

async fn login(State(desk): Page, request: Request) -> Result<Response, Response> {
    if session::is_of_another_site(request.headers()) {
        return Err(foreign());
    }
    let from = request.extensions().get::<ConnectInfo<Caller>>().map(|ConnectInfo(from)| from);
    let from = from.cloned();
    let Form(Login { token, to }) = form::<Login>(request).await?;
    let (token, to) = (token.trim().to_string(), local(to));
    let api = Api::new(desk.api.clone(), token.clone(), from.as_ref());
    if let Err(refusal) = api.get::<WhoAmI>("/v1/whoami").await {
        return Err(login_page(refusal.status, Some(&refusal.message), &to));
    }
    let internal = |text| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text).into_response();
    let session = Session::begin(token).map_err(internal)?;
    let cookie = session.cookie(&desk.shared.secrets).map_err(internal)?;
    Ok(([(header::SET_COOKIE, cookie)], Redirect::to(&to)).into_response())
}

async fn logout(_: Pressed) -> Response {
    ([(header::SET_COOKIE, session::no_cookie())], Redirect::to("/login")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_leads_to_this_page_alone() {
        for fine in ["/", "/apps/web", "/jobs/1?offset=2"] {
            assert_eq!(local(Some(fine.into())), fine);
        }
        for wrong in [
            "",
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "/a b",
            "/login",
            "/logout",
        ] {
            assert_eq!(local(Some(wrong.into())), "/", "{wrong}");
        }
        assert_eq!(local(None), "/");
    }
}
