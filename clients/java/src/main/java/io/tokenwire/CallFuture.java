package io.tokenwire;

import java.util.concurrent.CompletableFuture;

/** A future whose cancellation ends the call behind it. */
final class CallFuture<T> extends CompletableFuture<T> {
  private final Runnable cancel;

  CallFuture(Runnable cancel) {
    this.cancel = cancel;
  }

  @Override
  public boolean cancel(boolean mayInterruptIfRunning) {
    boolean cancelled = super.cancel(mayInterruptIfRunning);
    if (cancelled) {
      cancel.run();
    }
    return cancelled;
  }

  void settle(T value, Throwable error) {
    if (error != null) {
      completeExceptionally(error);
    } else {
      complete(value);
    }
  }
}
