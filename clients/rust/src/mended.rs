//! Mends answers that are not quite gRPC before tonic sees them.
//!
//! tonic panics on status details that are no base64, and reads the page of a proxy that says 503
//! as a broken message, which is not worth a retry.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body::{Body, Frame};
use prost::bytes::Bytes;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Error};
use tonic::{Code, Status};

const STATUS_KEY: &str = "grpc-status";
const DETAILS_KEY: &str = "grpc-status-details-bin";

/// A channel whose answers are gRPC.
pub(crate) struct Mended(pub(crate) Channel);

impl Service<http::Request<tonic::body::Body>> for Mended {
    type Response = http::Response<MendedBody>;
    type Error = Error;
    type Future = BoxFuture<Self::Response, Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async {
            let mut answer = answer.await?;
            if answer.status() != http::StatusCode::OK && !answer.headers().contains_key(STATUS_KEY)
            {
                answer = of_http(answer.status());
            }
            mend(answer.headers_mut()); // where there is nothing but a status
            Ok(answer.map(MendedBody))
        })
    }
}

pub(crate) struct MendedBody(tonic::body::Body);

impl Body for MendedBody {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let mut frame = ready!(Pin::new(&mut self.0).poll_frame(cx));
        if let Some(trailers) = frame.as_mut().and_then(|it| it.as_mut().ok()?.trailers_mut()) {
            mend(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

/// What gRPC's own document makes of an answer that is only HTTP.
fn of_http(status: http::StatusCode) -> http::Response<tonic::body::Body> {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(code, format!("the server, or a proxy, answered HTTP {status}")).into_http()
}

fn mend(headers: &mut http::HeaderMap) {
    if !headers.contains_key(DETAILS_KEY) {
        return;
    }
    let metadata = MetadataMap::from_headers(headers.clone());
    if metadata.get_bin(DETAILS_KEY).is_none_or(|details| details.to_bytes().is_err()) {
        headers.remove(DETAILS_KEY);
    }
}
