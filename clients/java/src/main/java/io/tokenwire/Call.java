package io.tokenwire;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.Context;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.time.Duration;
import java.util.Set;
import java.util.concurrent.TimeUnit;

/** One RPC under way: one request goes out, messages come in as they are asked for, it ends once. */
final class Call<Q, R> {
  /** What takes in what arrives; one method at a time. */
  interface Sink<R> {
    void message(R message);

    void end(Status status, Metadata trailers);
  }

  final String requestId;
  private final ClientCall<Q, R> rpc;
  private final Q request;
  private final Metadata headers = new Metadata();
  private final Set<Call<?, ?>> live;

  Call(
      Channel channel,
      MethodDescriptor<Q, R> method,
      Q request,
      RequestOptions options,
      Duration defaultTimeout,
      Set<Call<?, ?>> live) {
    CallOptions grpc = CallOptions.DEFAULT;
    // A deadline of the caller's own surroundings is as good as one that was given.
    boolean surrounded = Context.current().getDeadline() != null;
    Duration timeout = options.timeout(surrounded ? null : defaultTimeout).orElse(null);
    if (timeout != null) {
      grpc = grpc.withDeadlineAfter(nanos(timeout), TimeUnit.NANOSECONDS);
    }
    this.request = request;
    this.requestId = options.requestId();
    this.live = live;
    headers.merge(options.metadata());
    headers.put(TokenwireException.REQUEST_ID, requestId);
    rpc = channel.newCall(method, grpc);
  }

  private static long nanos(Duration timeout) {
    try {
      return timeout.toNanos();
    } catch (ArithmeticException e) {
      return Long.MAX_VALUE;
    }
  }

  /** Sends the request; `ahead` messages may come before anybody asks for more. */
  void start(Sink<? super R> sink, int ahead) {
    live.add(this);
    boolean started = false;
    try {
      rpc.start(
          new ClientCall.Listener<>() {
            @Override
            public void onMessage(R message) {
              sink.message(message);
            }

            @Override
            public void onClose(Status status, Metadata trailers) {
              live.remove(Call.this);
              sink.end(status, trailers);
            }
          },
          headers);
      started = true;
      if (ahead > 0) {
        rpc.request(ahead);
      }
      rpc.sendMessage(request);
      rpc.halfClose();
    } catch (RuntimeException | Error e) { // such as from the caller's own token supplier
      live.remove(this);
      if (started) {
        rpc.cancel("the request could not be sent", e);
      }
      throw e;
    }
  }

  /** Asks for one more message. */
  void more() {
    rpc.request(1);
  }

  /** Ends the call, at the gateway and at the upstream too. Nothing if it has ended. */
  void cancel(String why) {
    rpc.cancel(why, null);
  }

  TokenwireException failed(Status status, Metadata trailers, Reply partial) {
    return TokenwireException.of(status, trailers, requestId, partial);
  }

  /** This thread was interrupted while it waited for the call. */
  TokenwireException interrupted(Reply partial) {
    cancel("the waiting thread was interrupted");
    Thread.currentThread().interrupt();
    return failed(
        Status.CANCELLED.withDescription("the waiting thread was interrupted"),
        new Metadata(),
        partial);
  }
}
