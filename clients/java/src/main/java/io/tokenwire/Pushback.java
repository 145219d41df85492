package io.tokenwire;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ClientStreamTracer;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;

/**
 * Keeps the gateway's pushback from making gRPC retry what must not be: gRPC for Java retries every
 * status code that comes with a time to wait, also those the service config does not name, such as
 * RESOURCE_EXHAUSTED, and counts every code with -1 as a failure of the gateway. Only UNAVAILABLE
 * keeps its pushback; of other codes it moves to where gRPC does not look, and errors do.
 */
final class Pushback extends ClientStreamTracer {
  static final Metadata.Key<String> GRPC =
      Metadata.Key.of("grpc-retry-pushback-ms", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<String> MOVED =
      Metadata.Key.of("tokenwire-pushback-ms", Metadata.ASCII_STRING_MARSHALLER);

  private static final Factory HEEDED =
      new Factory() {
        @Override
        public ClientStreamTracer newClientStreamTracer(StreamInfo info, Metadata headers) {
          return new Pushback(); // one for each attempt
        }
      };

  /** For every call of a channel, those of the contract's own stubs among them. */
  static final ClientInterceptor INTERCEPTOR =
      new ClientInterceptor() {
        @Override
        public <Q, R> ClientCall<Q, R> interceptCall(
            MethodDescriptor<Q, R> method, CallOptions options, Channel next) {
          return next.newCall(method, options.withStreamTracerFactory(HEEDED));
        }
      };

  private volatile Metadata trailers;

  private Pushback() {}

  @Override
  public void inboundTrailers(Metadata mutable) {
    trailers = mutable;
  }

  /** Comes before gRPC's own retries look at the trailers. */
  @Override
  public void streamClosed(Status status) {
    if (trailers == null || status.getCode() == Status.Code.UNAVAILABLE) {
      return;
    }
    String told = trailers.get(GRPC);
    if (told != null) {
      trailers.discardAll(GRPC);
      trailers.put(MOVED, told);
    }
  }

  /** What the gateway said, wherever it is now; null if nothing. */
  static String in(Metadata trailers) {
    String told = trailers.get(GRPC);
    return told != null ? told : trailers.get(MOVED);
  }
}
