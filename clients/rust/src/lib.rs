// The README's snippets are run by tests/readme.rs, as one program that has a gateway.
#![cfg_attr(not(doctest), doc = include_str!("../README.md"))]
#![warn(missing_docs, unreachable_pub, clippy::pedantic)]
#![forbid(unsafe_code)]
// Getters: nobody calls one for its effect.
#![allow(clippy::must_use_candidate)]

mod call;
mod channel;
mod client;
mod errors;
mod mended;
mod reasons;
mod replies;
mod requests;
mod streams;
#[cfg(feature = "testing")]
pub mod testing;

/// The messages of the contract (package `tokenwire.v1`), and tonic's own clients of it.
///
/// Where you need them: [`Client::chat`] and the others take a [`ChatRequest`](v1::ChatRequest),
/// and every reply, event and error has its message as `proto()`.
#[allow(missing_docs, rustdoc::all, clippy::all, clippy::pedantic)]
pub mod v1 {
    include!("gen/tokenwire.v1.rs");
}

pub use call_builders::*;
pub use channel::Tls;
pub use client::{Builder, Client, StreamMode};
pub use errors::{Error, FieldViolation, JsonError};
pub use reasons::Reason;
pub use replies::{Accumulator, Choice, Event, EventKind, Reply, ToolCall};
pub use requests::{Message, Part, Request, Tool, ToolChoice, UnsupportedParameters};
pub use streams::{Batch, BatchResult, Stream, TextDeltas};
pub use tonic;
pub use tonic::Code;
pub use v1::FinishReason;

mod call_builders {
    pub use crate::client::{
        BatchCall, ChatCall, CountTokensCall, ModelCall, ModelsCall, StreamCall, TokenizeCall,
    };
}
