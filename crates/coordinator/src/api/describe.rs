//! What an operation takes and gives, read off its handler's own types: so the document can't say anything else than
//! what the code does.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::{
    App,
    access::{From, Peer, Who},
    events::{LastEventId, Stream},
    extract::{Args, Batch, Json, Maybe, Place, Raw, Spare},
    hooks::Push,
};
use crate::error::ApiResult;

/// One operation of the API as it is put together.
pub(super) struct Operation {
    /// The path's variables, in order.
    pub(super) places: Vec<String>,
    pub(super) parameters: Vec<Value>,
    pub(super) body: Option<Value>,
    /// Good answers by their status.
    pub(super) answers: Map<String, Value>,
}

/// What a handler takes.
pub(super) trait Input {
    /// Adds it to the operation.
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator);
}

impl Input for App {
    fn describe(_: &mut Operation, _: &mut SchemaGenerator) {}
}

impl Input for Who {
    fn describe(_: &mut Operation, _: &mut SchemaGenerator) {}
}

/// Open routes have refusals of their own.
impl Input for From {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        for status in ["401", "403", "409", "429", "500", "503"] {
            let refusal = json!({ "$ref": format!("#/components/responses/{status}") });
            operation.answers.insert(status.into(), refusal);
        }
    }
}

impl Input for Peer {
    fn describe(_: &mut Operation, _: &mut SchemaGenerator) {}
}

impl Input for LastEventId {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        operation.parameters.push(json!({
            "name": "Last-Event-ID", "in": "header", "required": false,
            "description": "The number of the last event that the caller has.",
            "schema": { "type": "integer", "minimum": 0 },
        }));
    }
}

impl Input for Push {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        let content = json!({ "application/json": {} });
        operation.body = Some(json!({ "required": true, "content": content }));
        for status in ["401", "429"] {
            let refusal = json!({ "$ref": format!("#/components/responses/{status}") });
            operation.answers.insert(status.into(), refusal);
        }
    }
}

/// A handler that reads the request itself reads bytes; JSON goes through [`Json`].
impl Input for axum::extract::Request {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        let content = json!({ "application/octet-stream": {} });
        operation.body = Some(json!({ "required": true, "content": content }));
    }
}

impl<T: JsonSchema> Input for Batch<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        <Json<T> as Input>::describe(operation, schemas);
    }
}

impl<T: JsonSchema> Input for Json<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        let content = json!({ "application/json": { "schema": schemas.subschema_for::<T>() } });
        operation.body = Some(json!({ "required": true, "content": content }));
    }
}

impl<T: JsonSchema> Input for Spare<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        <Json<Option<T>> as Input>::describe(operation, schemas);
        if let Some(body) = &mut operation.body {
            body["required"] = false.into();
        }
    }
}

/// A schema that is no reference.
fn resolved<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Value {
    let schema: Schema = schemas.root_schema_for::<T>();
    schema.to_value()
}

/// In an address a value is there or it is not: it is never null.
fn without_null(mut schema: Value) -> Value {
    let Some(object) = schema.as_object_mut() else { return schema };
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [one] = types.as_slice() {
            let one = one.clone();
            object.insert("type".into(), one);
        }
    }
    if let Some(Value::Array(any)) = object.get_mut("anyOf") {
        any.retain(|one| one["type"] != "null");
        if let [one] = any.as_slice() {
            let one = one.clone();
            object.remove("anyOf");
            if let Value::Object(rest) = one {
                object.extend(rest);
            }
        }
    }
    object.remove("default");
    schema
}

fn parameter(at: &str, name: &str, required: bool, schema: Value) -> Value {
    let mut schema = without_null(schema);
    let mut parameter = json!({ "name": name, "in": at, "required": required });
    if let Some(text) = schema.as_object_mut().and_then(|schema| schema.remove("description")) {
        parameter["description"] = text;
    }
    parameter["schema"] = schema;
    parameter
}

impl<T: JsonSchema> Input for Args<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        let schema = resolved::<T>(schemas);
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for (name, of) in schema["properties"].as_object().into_iter().flatten() {
            let is_required = required.iter().any(|one| one == name);
            operation.parameters.push(parameter("query", name, is_required, of.clone()));
        }
    }
}

impl<T: JsonSchema> Input for Place<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        let schema = schemas.subschema_for::<T>().to_value();
        let several = schema["prefixItems"].as_array().cloned();
        let each = several.unwrap_or_else(|| vec![schema]);
        for (name, of) in operation.places.clone().iter().zip(each) {
            operation.parameters.push(parameter("path", name, true, of));
        }
    }
}

/// What a handler answers when all is well.
pub(super) trait Answer {
    /// Adds it to the operation.
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator);
}

impl<T: JsonSchema> Answer for axum::Json<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        let content = json!({ "application/json": { "schema": schemas.subschema_for::<T>() } });
        let answer = json!({ "description": "Done.", "content": content });
        operation.answers.insert("200".into(), answer);
    }
}

impl Answer for Raw {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        let content = json!({ "application/octet-stream": {} });
        operation
            .answers
            .insert("200".into(), json!({ "description": "The bytes.", "content": content }));
    }
}

impl<T: JsonSchema> Answer for Maybe<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        <axum::Json<T> as Answer>::describe(operation, schemas);
        operation.answers.insert("204".into(), json!({ "description": "There is nothing." }));
    }
}

impl Answer for Stream {
    fn describe(operation: &mut Operation, _: &mut SchemaGenerator) {
        let content = json!({ "text/event-stream": {} });
        operation.answers.insert(
            "200".into(),
            json!({ "description": "A stream of events.", "content": content }),
        );
    }
}

/// A handler whose types say what it takes and gives. `Takes` is the tuple of its arguments.
pub(super) trait Documented<Takes> {
    /// Describes all of it.
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator);
}

macro_rules! documented {
    ($($taken:ident),*) => {
        impl<F, Answers, Given, $($taken),*> Documented<($($taken,)*)> for F
        where
            F: Fn($($taken),*) -> Answers,
            Answers: Future<Output = ApiResult<Given>>,
            Given: Answer,
            $($taken: Input,)*
        {
            fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
                $($taken::describe(operation, schemas);)*
                Given::describe(operation, schemas);
            }
        }
    };
}

documented!();
documented!(A);
documented!(A, B);
documented!(A, B, C);
documented!(A, B, C, D);
documented!(A, B, C, D, E);
