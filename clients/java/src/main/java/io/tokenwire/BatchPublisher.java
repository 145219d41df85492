package io.tokenwire;

import io.tokenwire.v1.BatchChatResponse;
import java.util.List;
import java.util.Objects;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * The results of a batch, each as soon as it is ready, without a waiting thread. Each subscription
 * makes a call of its own, and {@code cancel} ends it and what is left of the batch. What a
 * subscriber has not asked for is not read from the wire. {@code onComplete} means that every item
 * had its result; anything else is {@code onError}, as of a {@link ChatPublisher}.
 */
public final class BatchPublisher implements Flow.Publisher<BatchResult> {
  private final Supplier<Call<?, BatchChatResponse>> calls;
  private final BatchParams params;
  private final JsonCodec json;

  BatchPublisher(Supplier<Call<?, BatchChatResponse>> calls, BatchParams params, JsonCodec json) {
    this.calls = calls;
    this.params = params;
    this.json = json;
  }

  @Override
  public void subscribe(Flow.Subscriber<? super BatchResult> subscriber) {
    Objects.requireNonNull(subscriber, "subscriber");
    Call<?, BatchChatResponse> call = calls.get();
    Publication.subscribe(call, new Arriving(call, params, json, false), subscriber);
  }

  /**
   * Makes the call and hands each result to a consumer, one after the other: the next is read when
   * the consumer returns. What it throws ends the call and fails the future; so does a failure of
   * the whole batch.
   *
   * @param consumer what to do with a result
   * @return all results, in the order of the items; cancelling it ends the call
   */
  public CompletableFuture<List<BatchResult>> forEach(Consumer<? super BatchResult> consumer) {
    Call<?, BatchChatResponse> call = calls.get();
    return Publication.forEach(call, new Arriving(call, params, json, false), consumer);
  }

  /** See {@link TokenwireClient#batchOrderedAsync(BatchParams)}. */
  CompletableFuture<List<BatchResult>> ordered() {
    Call<?, BatchChatResponse> call = calls.get();
    return Publication.forEach(call, new Arriving(call, params, json, true), result -> {});
  }

  /** One batch while its results arrive. */
  private static final class Arriving
      implements Publication.Fold<BatchChatResponse, BatchResult, List<BatchResult>> {
    private final BatchStream.Results results;
    private final boolean keepsRemains;

    Arriving(
        Call<?, BatchChatResponse> call, BatchParams params, JsonCodec json, boolean keepsRemains) {
      results = new BatchStream.Results(call.requestId, params.proto().getItemsList(), json);
      this.keepsRemains = keepsRemains;
    }

    @Override
    public BatchResult add(BatchChatResponse message) {
      return results.add(message);
    }

    @Override
    public Reply partial() {
      return null;
    }

    @Override
    public List<BatchResult> whole() {
      results.end();
      return results.ordered(null);
    }

    @Override
    public List<BatchResult> remains(TokenwireException failure) {
      if (!keepsRemains) {
        throw failure;
      }
      return results.ordered(failure);
    }
  }
}
