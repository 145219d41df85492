package io.tokenwire;

import io.grpc.Metadata;
import io.grpc.Status;
import java.lang.ref.Cleaner;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.function.Supplier;

/** The messages of one call, for a thread that waits for each. */
final class Inbox<R> implements Call.Sink<R> {
  /** Messages that may wait here: enough to keep the wire busy, few enough to slow it down. */
  private static final int AHEAD = 8;

  /** Ends the calls of streams that somebody dropped without closing them. */
  private static final Cleaner CLEANER = Cleaner.create();

  private static final System.Logger LOG = System.getLogger("io.tokenwire");

  private static final String LEFT = "the caller left the stream";

  private record End(Status status, Metadata trailers) {}

  private final Call<?, R> call;
  private final LinkedBlockingQueue<Object> arrived = new LinkedBlockingQueue<>();
  private End end;
  private volatile boolean over;
  private volatile boolean left;

  private Inbox(Call<?, R> call) {
    this.call = call;
  }

  /** Starts the call; it ends with its `owner` at the latest. */
  static <R> Inbox<R> open(Call<?, R> call, Object owner) {
    Inbox<R> inbox = new Inbox<>(call);
    call.start(inbox, AHEAD);
    Throwable opened = new Throwable("it was opened here");
    CLEANER.register(owner, () -> inbox.dropped(opened));
    return inbox;
  }

  /** Nobody can read on. As gRPC does of a channel, tell who forgot to close it: they paid for it. */
  private void dropped(Throwable opened) {
    if (!over) {
      cancel();
      LOG.log(
          System.Logger.Level.WARNING,
          "a stream that nobody had closed ran on until it was garbage (request "
              + call.requestId
              + "): use try (...), or forEach",
          opened);
    }
  }

  @Override
  public void message(R message) {
    arrived.add(message);
  }

  @Override
  public void end(Status status, Metadata trailers) {
    over = true;
    arrived.add(new End(status, trailers));
  }

  /** The next message, waited for; null once the server has said OK. */
  @SuppressWarnings("unchecked") // all but End came by message()
  R take(Supplier<Reply> partial) {
    if (end == null) {
      Object next = null;
      try {
        next = left ? null : arrived.take();
      } catch (InterruptedException e) {
        throw call.interrupted(partial.get());
      }
      if (left) { // who has left gets nothing more, though it be here
        Status status = Status.CANCELLED.withDescription(LEFT);
        throw call.failed(status, new Metadata(), partial.get());
      }
      if (!(next instanceof End last)) {
        call.more();
        return (R) next;
      }
      end = last;
    }
    if (!end.status.isOk()) {
      throw call.failed(end.status, end.trailers, partial.get());
    }
    return null;
  }

  void cancel() {
    over = true;
    left = true;
    call.cancel(LEFT);
  }
}
