package io.tokenwire;

import io.grpc.Metadata;
import io.grpc.Status;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.function.Function;

/** A call with one answer, to be made once: waited for, or told to a future. */
final class Unary<R, T> implements Call.Sink<R> {
  private final Call<?, R> call;
  private final Function<? super R, T> convert;
  private final CountDownLatch over = new CountDownLatch(1);
  private CallFuture<T> future;
  private R message;
  private Status status;
  private Metadata trailers;

  Unary(Call<?, R> call, Function<? super R, T> convert) {
    this.call = call;
    this.convert = convert;
  }

  T await() {
    start();
    try {
      over.await();
    } catch (InterruptedException e) {
      throw call.interrupted(null);
    }
    return answer(); // here, so that the trace of an error leads to the caller
  }

  CompletableFuture<T> async() {
    future = new CallFuture<>(() -> call.cancel("the future was cancelled"));
    try {
      start();
    } catch (RuntimeException | Error e) { // such as from the caller's own token supplier
      future.settle(null, e);
    }
    return future;
  }

  private void start() {
    call.start(this, 2); // a second answer to a unary call would be an error: let gRPC see it
  }

  @Override
  public void message(R received) {
    message = received;
  }

  @Override
  public void end(Status ended, Metadata last) {
    status = ended;
    trailers = last;
    over.countDown();
    if (future == null) {
      return;
    }
    T answer;
    try {
      answer = answer();
    } catch (RuntimeException | Error e) {
      future.settle(null, e);
      return;
    }
    future.settle(answer, null);
  }

  private T answer() {
    if (!status.isOk()) {
      throw call.failed(status, trailers, null);
    }
    if (message == null) {
      throw TokenwireException.incomplete(
          "the call ended with OK but without its answer", call.requestId, null);
    }
    return convert.apply(message);
  }
}
