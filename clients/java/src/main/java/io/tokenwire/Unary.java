package io.tokenwire;

import io.grpc.Metadata;
import io.grpc.Status;
import java.util.concurrent.CountDownLatch;
import java.util.function.BiConsumer;
import java.util.function.Function;

/** A call with one answer: waited for, or told to a callback. */
final class Unary<R, T> implements Call.Sink<R> {
  private final Call<?, R> call;
  private final Function<? super R, T> convert;
  private final CountDownLatch over = new CountDownLatch(1);
  private final BiConsumer<T, Throwable> callback;
  private R message;
  private Status status;
  private Metadata trailers;

  /** The callback gets either the answer or what went wrong. */
  Unary(Call<?, R> call, Function<? super R, T> convert, BiConsumer<T, Throwable> callback) {
    this.call = call;
    this.convert = convert;
    this.callback = callback;
  }

  static <R, T> T await(Call<?, R> call, Function<? super R, T> convert) {
    Unary<R, T> unary = new Unary<>(call, convert, (answer, error) -> {});
    call.start(unary, 2); // a second answer to a unary call would be an error: let gRPC see it
    try {
      unary.over.await();
    } catch (InterruptedException e) {
      throw call.interrupted(null);
    }
    return unary.answer(); // here, so that the trace of an error leads to the caller
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
    T answer;
    try {
      answer = answer();
    } catch (RuntimeException e) {
      callback.accept(null, e);
      return;
    }
    callback.accept(answer, null);
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
