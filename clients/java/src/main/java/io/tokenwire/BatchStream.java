package io.tokenwire;

import io.grpc.Status;
import io.tokenwire.v1.BatchChatItem;
import io.tokenwire.v1.BatchChatResponse;
import java.lang.ref.Reference;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.function.Consumer;

/**
 * The results of a batch, each as soon as it is ready. Iterate over it, once, within {@code try
 * (...)}: leaving that ends the call and what is left of the batch. {@link #forEach} ends it by
 * itself. For one thread; {@link #close} may be called from any.
 */
public final class BatchStream implements Iterable<BatchResult>, AutoCloseable {
  private final Inbox<BatchChatResponse> inbox;
  private final Results results;

  BatchStream(Call<?, BatchChatResponse> call, BatchParams params, JsonCodec json) {
    results = new Results(call.requestId, params.proto().getItemsList(), json);
    inbox = Inbox.open(call, this);
  }

  /**
   * The results, in order of completion.
   *
   * @return an iterator; each call gives one that goes on where the last one stopped
   */
  @Override
  public Iterator<BatchResult> iterator() {
    return new Iterator<>() {
      private BatchResult next;

      @Override
      public boolean hasNext() {
        if (next == null) {
          next = read();
        }
        return next != null;
      }

      @Override
      public BatchResult next() {
        if (!hasNext()) {
          throw new NoSuchElementException("the batch has ended");
        }
        BatchResult result = next;
        next = null;
        return result;
      }
    };
  }

  /**
   * Hands over the results that are left, and ends the call in any case: also if the consumer
   * throws.
   *
   * @param consumer what to do with a result
   * @throws TokenwireException if the batch failed as a whole
   */
  @Override
  public void forEach(Consumer<? super BatchResult> consumer) {
    try {
      for (BatchResult result : this) {
        consumer.accept(result);
      }
    } finally {
      close();
    }
  }

  private BatchResult read() {
    while (true) {
      BatchChatResponse message;
      try {
        message = inbox.take(() -> null);
      } finally {
        Reference.reachabilityFence(this); // who waits has not dropped it
      }
      if (message == null) {
        results.end();
        return null;
      }
      try {
        BatchResult result = results.add(message);
        if (result != null) {
          return result;
        }
      } catch (TokenwireException e) {
        inbox.cancel(); // what is refused here goes on there
        throw e;
      }
    }
  }

  List<BatchResult> ordered() {
    try {
      while (read() != null) {
        continue; // it is in the results
      }
    } catch (TokenwireException e) {
      return results.ordered(e);
    }
    return results.ordered(null);
  }

  /** Ends the call, if it has not ended. */
  @Override
  public void close() {
    inbox.cancel();
  }

  /** Takes in one batch. */
  static final class Results {
    private final String requestId;
    private final List<BatchChatItem> items;
    private final JsonCodec json;
    private final BatchResult[] results;
    private int missing;
    private boolean mixedUp;

    Results(String requestId, List<BatchChatItem> items, JsonCodec json) {
      this.requestId = requestId;
      this.items = items;
      this.json = json;
      results = new BatchResult[items.size()];
      missing = items.size();
    }

    /** The result in a message; null for one newer than this package, or a heartbeat. */
    BatchResult add(BatchChatResponse message) {
      int index = message.getIndex();
      Reply reply = null;
      TokenwireException error = null;
      switch (message.getResultCase()) {
        case RESPONSE -> reply = new Reply(message.getResponse(), requestId, json);
        case ERROR -> error = TokenwireException.of(message.getError(), requestId);
        default -> {
          return null;
        }
      }
      if (index < 0 || index >= results.length || results[index] != null) {
        mixedUp = true;
        throw TokenwireException.incomplete(
            "got a result of item " + index + ", which is none of the batch or had one",
            requestId,
            null);
      }
      missing--;
      results[index] = new BatchResult(index, message.getCustomId(), reply, error);
      return results[index];
    }

    /** The server said OK. */
    void end() {
      if (missing > 0) {
        throw TokenwireException.incomplete(
            "the batch ended with OK but without the result of "
                + missing
                + " of "
                + results.length
                + " items",
            requestId,
            null);
      }
    }

    /**
     * All results by index. With a failure of the batch as a whole, the items it left without a
     * result have it as their error: the results that did arrive have been paid for. Throws it when
     * there is none, when the caller has left, and when some were of no item: nobody knows then
     * whose the others are.
     */
    List<BatchResult> ordered(TokenwireException failure) {
      if (failure != null) {
        boolean left = failure.code() == Status.Code.CANCELLED;
        if (left || mixedUp || missing == results.length) {
          throw failure;
        }
      }
      List<BatchResult> all = new ArrayList<>();
      for (int i = 0; i < results.length; i++) {
        all.add(
            results[i] != null
                ? results[i]
                : new BatchResult(i, items.get(i).getCustomId(), null, failure));
      }
      return List.copyOf(all);
    }
  }
}
