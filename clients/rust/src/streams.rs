//! Answers that come in pieces: an answer as it grows, and the results of a batch.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::call::Receiving;
use crate::errors::Error;
use crate::replies::{Accumulator, Choice, Event, Reply, ToolCall};
use crate::v1::{self, FinishReason, batch_chat_response};
use tonic::Code;

/// An answer as it grows: a [`futures_core::Stream`] of [`Event`]s that keeps the answer so far.
///
/// A loop that ends without an error has seen the whole answer. Dropping this cancels the call,
/// at the gateway and at the upstream.
///
/// The methods that name no choice are about the first one.
#[must_use = "dropping a stream cancels its call"]
pub struct Stream {
    receiving: Receiving<v1::StreamChatResponse>,
    answer: Accumulator,
    error: Option<Error>,
    started: Instant,
    first_token: Option<Duration>,
}

impl Stream {
    pub(crate) fn new(receiving: Receiving<v1::StreamChatResponse>, started: Instant) -> Self {
        let (answer, error, first_token) = (Accumulator::new(), None, None);
        Self { receiving, answer, error, started, first_token }
    }

    /// The next event; `None` after the last one of a whole answer, and after an error.
    ///
    /// # Errors
    /// What ended the stream, with what had arrived as [`Error::partial`]. A stream that ends
    /// with OK but is not whole fails with [`StreamIncomplete`](crate::Reason::StreamIncomplete).
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    /// Only the new text of the first choice.
    pub fn text_deltas(&mut self) -> TextDeltas<'_> {
        self.text_deltas_of(0)
    }

    /// Only the new text of one choice.
    pub fn text_deltas_of(&mut self, choice_index: i32) -> TextDeltas<'_> {
        TextDeltas { stream: self, choice_index }
    }

    /// Reads what is left; the whole answer, as [`chat`](crate::Client::chat) returns it.
    ///
    /// # Errors
    /// What ended the stream, also if an earlier read has told so already.
    pub async fn reply(&mut self) -> Result<Reply, Error> {
        while let Some(event) = self.next().await {
            event?;
        }
        match &self.error {
            Some(error) => Err(error.clone()),
            None => Ok(self.answer.so_far(&self.receiving.request_id)),
        }
    }

    /// The answer so far.
    pub fn answer(&self) -> &Accumulator {
        &self.answer
    }

    /// Answers so far, by index.
    pub fn choices(&self) -> impl ExactSizeIterator<Item = Choice<'_>> {
        self.answer.choices()
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        self.answer.first().text()
    }

    /// The reasoning so far.
    pub fn reasoning(&self) -> &str {
        self.answer.first().reasoning()
    }

    /// The message so far.
    pub fn message(&self) -> v1::ChatMessage {
        self.answer.first().message()
    }

    /// The tool calls so far; whole once the choice has a finish reason.
    pub fn tool_calls(&self) -> impl ExactSizeIterator<Item = ToolCall<'_>> {
        self.answer.first().tool_calls()
    }

    /// Why the answer ended; [`FinishReason::Unspecified`] while it grows.
    pub fn finish_reason(&self) -> FinishReason {
        self.answer.first().finish_reason()
    }

    /// Model, upstream, attempts; `None` before the first event.
    pub fn header(&self) -> Option<&v1::ResponseHeader> {
        self.answer.header()
    }

    /// Tokens used; `None` until the stream is complete.
    pub fn usage(&self) -> Option<&v1::Usage> {
        self.answer.usage()
    }

    /// The call's `x-request-id`.
    pub fn request_id(&self) -> &str {
        &self.receiving.request_id
    }

    /// From the call to the first text, reasoning or tool call, measured here.
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token
    }

    /// Whether the whole answer is here.
    pub fn is_complete(&self) -> bool {
        self.answer.is_complete()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, Error>>> {
        if self.error.is_some() {
            return Poll::Ready(None);
        }
        let error = loop {
            match ready!(self.receiving.poll_next(cx)) {
                Some(Ok(message)) => {
                    let Some(event) = self.answer.add(message) else { continue };
                    if self.first_token.is_none() && event.has_token() {
                        self.first_token = Some(self.started.elapsed());
                    }
                    return Poll::Ready(Some(Ok(event)));
                }
                Some(Err(error)) => break error,
                None if self.answer.is_complete() => return Poll::Ready(None),
                // A wrong OK is worse than any error: it would pass a part off as the whole.
                None => {
                    let message = "the stream ended with OK but without its trailer: \
                                   the answer is not whole";
                    break Error::incomplete(message).with_request_id(&self.receiving.request_id);
                }
            }
        };
        let error = error.with_partial(self.answer.so_far(&self.receiving.request_id));
        self.error = Some(error.clone());
        Poll::Ready(Some(Err(error)))
    }
}

impl futures_core::Stream for Stream {
    type Item = Result<Event, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("text", &self.text())
            .field("is_complete", &self.is_complete())
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}

/// The new text of one choice: a [`futures_core::Stream`] from [`Stream::text_deltas`].
#[derive(Debug)]
pub struct TextDeltas<'a> {
    stream: &'a mut Stream,
    choice_index: i32,
}

impl TextDeltas<'_> {
    /// The next piece of text, never empty.
    ///
    /// # Errors
    /// As [`Stream::next`].
    pub async fn next(&mut self) -> Option<Result<String, Error>> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<String, Error>>> {
        loop {
            match ready!(self.stream.poll(cx)) {
                Some(Ok(event)) => {
                    if event.choice_index() == self.choice_index && !event.text().is_empty() {
                        return Poll::Ready(Some(Ok(event.text().to_owned())));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}

impl futures_core::Stream for TextDeltas<'_> {
    type Item = Result<String, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx)
    }
}

/// How one item of a batch ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BatchResult {
    /// Position among the items.
    pub index: usize,
    /// The item's own name; `""` when it had none.
    pub custom_id: String,
    /// The answer, or why there is none.
    pub result: Result<Reply, Error>,
}

/// The results of a batch, each as soon as it is there: a [`futures_core::Stream`].
///
/// Dropping this cancels what has not been answered.
#[must_use = "dropping a batch cancels its call"]
pub struct Batch {
    receiving: Receiving<v1::BatchChatResponse>,
    custom_ids: Vec<String>,
    results: BTreeMap<usize, BatchResult>,
    ended: bool,
    mixed_up: bool,
}

impl Batch {
    pub(crate) fn new(
        receiving: Receiving<v1::BatchChatResponse>,
        custom_ids: Vec<String>,
    ) -> Self {
        Self { receiving, custom_ids, results: BTreeMap::new(), ended: false, mixed_up: false }
    }

    /// The next result; `None` after the last.
    ///
    /// # Errors
    /// What ended the batch as a whole. An item that failed is no such error: see
    /// [`BatchResult::result`].
    pub async fn next(&mut self) -> Option<Result<BatchResult, Error>> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    /// Waits for all; the results in the order of the items, those told already among them.
    ///
    /// When the batch as a whole fails after some results, the items without one have that
    /// failure as their error: the results that did arrive have been paid for.
    ///
    /// # Errors
    /// When it fails before any result, is cancelled, or has results of no item.
    pub async fn ordered(mut self) -> Result<Vec<BatchResult>, Error> {
        while let Some(result) = self.next().await {
            let Err(error) = result else { continue };
            // Nobody knows whose the others are where some were of no item.
            if self.results.is_empty() || self.mixed_up || error.code() == Code::Cancelled {
                return Err(error);
            }
            for index in self.missing() {
                let custom_id = self.custom_ids[index].clone();
                let result = BatchResult { index, custom_id, result: Err(error.clone()) };
                self.results.insert(index, result);
            }
        }
        Ok(self.results.into_values().collect())
    }

    /// The call's `x-request-id`.
    pub fn request_id(&self) -> &str {
        &self.receiving.request_id
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.custom_ids.len()).filter(|index| !self.results.contains_key(index)).collect()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<BatchResult, Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        loop {
            let message = match ready!(self.receiving.poll_next(cx)) {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.ended = true;
                    return Poll::Ready(self.lost().map(Err));
                }
            };
            // A result that is not set is a heartbeat, or newer than this crate.
            let Some(ended) = message.result else { continue };
            let request_id = &self.receiving.request_id;
            let index = usize::try_from(message.index).unwrap_or(usize::MAX);
            if index >= self.custom_ids.len() || self.results.contains_key(&index) {
                (self.ended, self.mixed_up) = (true, true);
                let message = format!(
                    "got a result of item {}, which is none of the batch or had one",
                    message.index
                );
                let error = Error::incomplete(message).with_request_id(request_id);
                return Poll::Ready(Some(Err(error)));
            }
            let result = match ended {
                batch_chat_response::Result::Response(reply) => Ok(Reply::new(reply, request_id)),
                batch_chat_response::Result::Error(status) => {
                    Err(Error::from_proto(status, request_id.clone()))
                }
            };
            let result = BatchResult { index, custom_id: message.custom_id, result };
            self.results.insert(index, result.clone());
            return Poll::Ready(Some(Ok(result)));
        }
    }

    fn lost(&self) -> Option<Error> {
        let (missing, all) = (self.missing().len(), self.custom_ids.len());
        let message =
            format!("the batch ended with OK, but without the result of {missing} of {all} items");
        let error = Error::incomplete(message).with_request_id(&self.receiving.request_id);
        (missing > 0).then_some(error)
    }
}

impl futures_core::Stream for Batch {
    type Item = Result<BatchResult, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll(cx)
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("results", &self.results.len())
            .field("items", &self.custom_ids.len())
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}
