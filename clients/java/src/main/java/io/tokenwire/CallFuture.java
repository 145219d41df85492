package io.tokenwire;

import java.util.concurrent.CompletableFuture;

/**
 * A future that ends the call behind it when anyone but the call itself completes it: by {@code
 * cancel}, by {@code orTimeout}, by {@code complete}.
 */
final class CallFuture<T> extends CompletableFuture<T> {
  private volatile boolean settled;

  CallFuture(Runnable cancel) {
    whenComplete(
        (value, error) -> {
          if (!settled) {
            cancel.run();
          }
        });
  }

  /** What the call came to. */
  void settle(T value, Throwable error) {
    settled = true;
    if (error != null) {
      completeExceptionally(error);
    } else {
      complete(value);
    }
  }
}
