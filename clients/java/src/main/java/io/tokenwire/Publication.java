package io.tokenwire;

import io.grpc.Metadata;
import io.grpc.Status;
import java.util.Objects;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.function.Consumer;

/** One call whose messages go to a subscriber, read as fast as it asks. */
final class Publication<M, E, W> implements Flow.Subscription, Call.Sink<M> {
  /** What becomes of the messages of one call; one method at a time. */
  interface Fold<M, E, W> {
    /**
     * The event in a message; null for one to leave out. Throws TokenwireException for a message
     * that cannot be.
     */
    E add(M message);

    /** What had arrived, for the error of a call that failed; null where no error tells it. */
    Reply partial();

    /** All of it, once the server has said OK. Throws TokenwireException if something lacks. */
    W whole();

    /** What a call that failed leaves; throws the failure if nothing. */
    default W remains(TokenwireException failure) {
      throw failure;
    }
  }

  private final Call<?, M> call;
  private final Fold<M, E, W> fold;
  private final Flow.Subscriber<? super E> subscriber;
  private W whole;
  // Guarded by this.
  private long demand;
  private boolean started;
  private boolean asked;
  private boolean over;
  private IllegalArgumentException misuse;

  private Publication(Call<?, M> call, Fold<M, E, W> fold, Flow.Subscriber<? super E> subscriber) {
    this.call = call;
    this.fold = fold;
    this.subscriber = subscriber;
  }

  static <M, E, W> void subscribe(
      Call<?, M> call, Fold<M, E, W> fold, Flow.Subscriber<? super E> subscriber) {
    Publication<M, E, W> publication = new Publication<>(call, fold, subscriber);
    subscriber.onSubscribe(publication);
    publication.start();
  }

  /** Hands each event to a consumer, the next when it returns; gives the whole. */
  static <M, E, W> CompletableFuture<W> forEach(
      Call<?, M> call, Fold<M, E, W> fold, Consumer<? super E> consumer) {
    Each<E, W> each = new Each<>(Objects.requireNonNull(consumer, "consumer"));
    Publication<M, E, W> publication = new Publication<>(call, fold, each);
    each.publication = publication;
    each.future = new CallFuture<>(publication::cancel);
    publication.request(1);
    publication.start();
    return each.future;
  }

  private static final class Each<E, W> implements Flow.Subscriber<E> {
    private final Consumer<? super E> consumer;
    private Publication<?, E, W> publication;
    private CallFuture<W> future;

    Each(Consumer<? super E> consumer) {
      this.consumer = consumer;
    }

    @Override
    public void onSubscribe(Flow.Subscription unused) {
      // forEach has it already
    }

    @Override
    public void onNext(E event) {
      try {
        consumer.accept(event);
      } catch (RuntimeException | Error e) {
        publication.cancel();
        future.completeExceptionally(e);
        return;
      }
      publication.request(1);
    }

    @Override
    public void onError(Throwable error) {
      if (!(error instanceof TokenwireException failure)) {
        future.completeExceptionally(error);
        return;
      }
      W remains;
      try {
        remains = publication.fold.remains(failure);
      } catch (TokenwireException e) {
        future.completeExceptionally(e);
        return;
      }
      future.complete(remains);
    }

    @Override
    public void onComplete() {
      future.complete(publication.whole);
    }
  }

  private void start() {
    synchronized (this) {
      if (over) {
        return;
      }
    }
    try {
      // Without the lock: the caller's own token supplier may take its time, and cancel() not.
      call.start(this, 0);
    } catch (RuntimeException | Error e) { // such as from that supplier
      if (finish()) {
        subscriber.onError(e);
      }
      return;
    }
    boolean left;
    synchronized (this) {
      started = true;
      left = over || misuse != null;
    }
    if (left) {
      call.cancel("the subscriber left, or asked for nothing, while the call began");
    }
    ask();
  }

  @Override
  public synchronized void request(long count) {
    if (over || misuse != null) {
      return;
    }
    if (count <= 0) {
      misuse = new IllegalArgumentException("request: expected more than 0, got " + count);
      if (started) {
        call.cancel("the subscriber asked for nothing"); // end() tells it
      }
      return;
    }
    demand = demand + count < 0 ? Long.MAX_VALUE : demand + count;
    ask();
  }

  @Override
  public void cancel() {
    synchronized (this) { // in one look: who comes before `started` leaves it to start()
      if (over) {
        return;
      }
      over = true;
      if (!started) {
        return;
      }
    }
    call.cancel("the subscriber cancelled");
  }

  private synchronized void ask() {
    if (started && !asked && !over && demand > 0) {
      asked = true;
      call.more();
    }
  }

  private synchronized boolean finish() {
    boolean first = !over;
    over = true;
    return first;
  }

  @Override
  public void message(M message) {
    E event;
    try {
      event = fold.add(message);
    } catch (TokenwireException e) {
      if (finish()) {
        call.cancel("the message cannot be"); // what is refused here goes on there
        subscriber.onError(e);
      }
      return;
    }
    synchronized (this) {
      asked = false;
      if (over || misuse != null) {
        return;
      }
      if (event != null) {
        demand--;
      }
    }
    if (event != null) {
      subscriber.onNext(event);
    }
    ask();
  }

  @Override
  public void end(Status status, Metadata trailers) {
    IllegalArgumentException wrong;
    synchronized (this) {
      wrong = misuse;
    }
    if (!finish()) {
      return;
    }
    if (wrong != null) {
      subscriber.onError(wrong);
      return;
    }
    try {
      if (!status.isOk()) {
        throw call.failed(status, trailers, fold.partial());
      }
      whole = fold.whole();
    } catch (TokenwireException e) {
      subscriber.onError(e);
      return;
    }
    subscriber.onComplete();
  }
}
