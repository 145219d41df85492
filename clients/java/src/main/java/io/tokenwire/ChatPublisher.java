package io.tokenwire;

import io.tokenwire.v1.StreamChatResponse;
import java.util.Objects;
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
    Call<?, StreamChatResponse> call = calls.get();
    Publication.subscribe(call, new Growing(call.requestId, json), subscriber);
  }

  /**
   * Makes the call and hands each event to a consumer, one after the other: the next is read when
   * the consumer returns. What it throws ends the call and fails the future.
   *
   * @param consumer what to do with an event
   * @return the whole answer; cancelling it ends the call
   */
  public CompletableFuture<Reply> forEach(Consumer<? super ChatEvent> consumer) {
    Call<?, StreamChatResponse> call = calls.get();
    return Publication.forEach(call, new Growing(call.requestId, json), consumer);
  }

  /** One answer while it grows. */
  private static final class Growing
      implements Publication.Fold<StreamChatResponse, ChatEvent, Reply> {
    private final String requestId;
    private final Accumulator answer;

    Growing(String requestId, JsonCodec json) {
      this.requestId = requestId;
      answer = new Accumulator(json);
    }

    @Override
    public ChatEvent add(StreamChatResponse message) {
      return answer.add(message).orElse(null);
    }

    @Override
    public Reply partial() {
      return answer.reply(requestId);
    }

    @Override
    public Reply whole() {
      if (!answer.isComplete()) {
        throw ChatStream.incomplete(requestId, answer);
      }
      return answer.reply(requestId);
    }
  }
}
