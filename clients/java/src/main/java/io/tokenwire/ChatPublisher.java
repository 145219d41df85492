package io.tokenwire;

import io.grpc.Metadata;
import io.grpc.Status;
import io.tokenwire.v1.StreamChatResponse;
import java.util.Objects;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * An answer as it grows, without a waiting thread. Each subscription makes a call of its own, and
 * {@code cancel} ends it, at the gateway and at the upstream. What a subscriber has not asked for is
 * not read from the wire. {@code onComplete} means that the answer was whole; anything else is
 * {@code onError} with a {@link TokenwireException}, or with what the caller's own token supplier
 * threw.
 */
public final class ChatPublisher implements Flow.Publisher<ChatEvent> {
  private final Supplier<Call<?, StreamChatResponse>> calls;
  private final JsonCodec json;

  ChatPublisher(Supplier<Call<?, StreamChatResponse>> calls, JsonCodec json) {
    this.calls = calls;
    this.json = json;
  }

  @Override
  public void subscribe(Flow.Subscriber<? super ChatEvent> subscriber) {
    Objects.requireNonNull(subscriber, "subscriber");
    Subscription subscription = new Subscription(calls.get(), json, subscriber);
    subscriber.onSubscribe(subscription);
    subscription.start();
  }

  /**
   * Makes the call and hands each event to a consumer, one after the other: the next is read when
   * the consumer returns. What it throws ends the call and fails the future.
   *
   * @param consumer what to do with an event
   * @return the whole answer; cancelling it ends the call
   */
  public CompletableFuture<Reply> forEach(Consumer<? super ChatEvent> consumer) {
    Objects.requireNonNull(consumer, "consumer");
    Each each = new Each(consumer);
    Subscription subscription = new Subscription(calls.get(), json, each);
    each.future = new CallFuture<>(subscription::cancel);
    each.subscription = subscription;
    subscription.request(1);
    subscription.start();
    return each.future;
  }

  private static final class Each implements Flow.Subscriber<ChatEvent> {
    private final Consumer<? super ChatEvent> consumer;
    private CallFuture<Reply> future;
    private Subscription subscription;

    Each(Consumer<? super ChatEvent> consumer) {
      this.consumer = consumer;
    }

    @Override
    public void onSubscribe(Flow.Subscription unused) {
      // forEach has it already
    }

    @Override
    public void onNext(ChatEvent event) {
      try {
        consumer.accept(event);
      } catch (RuntimeException | Error e) {
        subscription.cancel();
        future.completeExceptionally(e);
        return;
      }
      subscription.request(1);
    }

    @Override
    public void onError(Throwable error) {
      future.completeExceptionally(error);
    }

    @Override
    public void onComplete() {
      future.complete(subscription.reply());
    }
  }

  /** One call, read as fast as its subscriber asks. */
  private static final class Subscription
      implements Flow.Subscription, Call.Sink<StreamChatResponse> {
    private final Call<?, StreamChatResponse> call;
    private final Accumulator answer;
    private final Flow.Subscriber<? super ChatEvent> subscriber;
    // Guarded by this.
    private long demand;
    private boolean started;
    private boolean asked;
    private boolean over;
    private IllegalArgumentException misuse;

    Subscription(
        Call<?, StreamChatResponse> call,
        JsonCodec json,
        Flow.Subscriber<? super ChatEvent> subscriber) {
      this.call = call;
      this.answer = new Accumulator(json);
      this.subscriber = subscriber;
    }

    void start() {
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

    Reply reply() {
      return answer.reply(call.requestId);
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
    public void message(StreamChatResponse message) {
      Optional<ChatEvent> event = answer.add(message);
      synchronized (this) {
        asked = false;
        if (over || misuse != null) {
          return;
        }
        if (event.isPresent()) {
          demand--;
        }
      }
      event.ifPresent(subscriber::onNext);
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
      } else if (!status.isOk()) {
        subscriber.onError(call.failed(status, trailers, reply()));
      } else if (!answer.isComplete()) {
        subscriber.onError(ChatStream.incomplete(call.requestId, answer));
      } else {
        subscriber.onComplete();
      }
    }
  }
}
