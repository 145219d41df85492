package io.tokenwire;

import java.lang.ref.Reference;
import java.time.Duration;
import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.Optional;
import java.util.function.Consumer;

/**
 * An answer as it grows. Iterate over its events, once, within {@code try (...)}: leaving that ends
 * the call, at the gateway and at the upstream. {@link #forEach} and {@link #reply} end it by
 * themselves. One that is left otherwise goes on until it is collected as garbage, which is logged
 * as a warning.
 *
 * <p>A loop that ends without an exception has seen the whole answer. A stream that was cut, even
 * one that says OK, throws {@link TokenwireException}. For one thread; {@link #close} may be called
 * from any.
 */
public final class ChatStream implements Answer, Iterable<ChatEvent>, AutoCloseable {
  private final Inbox<io.tokenwire.v1.StreamChatResponse> inbox;
  private final String requestId;
  private final Accumulator answer;
  private final long started = System.nanoTime();
  private Duration timeToFirstToken;
  private TokenwireException error;
  private boolean ended;

  ChatStream(Call<?, io.tokenwire.v1.StreamChatResponse> call, JsonCodec json) {
    requestId = call.requestId;
    answer = new Accumulator(json);
    inbox = Inbox.open(call, this);
  }

  /**
   * The events, each as soon as it is there. Heartbeats, and events newer than this package, are
   * left out.
   *
   * @return an iterator; each call gives one that goes on where the last one stopped
   */
  @Override
  public Iterator<ChatEvent> iterator() {
    return new Iterator<>() {
      private ChatEvent next;

      @Override
      public boolean hasNext() {
        if (next == null) {
          next = read();
        }
        return next != null;
      }

      @Override
      public ChatEvent next() {
        if (!hasNext()) {
          throw new NoSuchElementException("the stream has ended");
        }
        ChatEvent event = next;
        next = null;
        return event;
      }
    };
  }

  /**
   * Hands over the events that are left, and ends the call in any case: also if the consumer throws.
   *
   * @param consumer what to do with an event
   * @throws TokenwireException if the stream failed
   */
  @Override
  public void forEach(Consumer<? super ChatEvent> consumer) {
    closing(this, consumer);
  }

  /** Reads to the end, and closes whatever happens. */
  private <T> void closing(Iterable<T> events, Consumer<? super T> consumer) {
    try {
      for (T event : events) {
        consumer.accept(event);
      }
    } finally {
      close();
    }
  }

  /**
   * Only the text of the first choice, piece by piece. Its {@code forEach} ends the call in any case,
   * as that of the stream does.
   *
   * @return the pieces, none of them empty
   */
  public Iterable<String> texts() {
    return new Iterable<>() {
      @Override
      public Iterator<String> iterator() {
        return textsOf(ChatStream.this.iterator());
      }

      @Override
      public void forEach(Consumer<? super String> consumer) {
        closing(this, consumer);
      }
    };
  }

  private static Iterator<String> textsOf(Iterator<ChatEvent> events) {
    return new Iterator<>() {
      private String next = "";

      @Override
      public boolean hasNext() {
        while (next.isEmpty() && events.hasNext()) {
          ChatEvent event = events.next();
          next = event.choiceIndex() == 0 ? event.text() : "";
        }
        return !next.isEmpty();
      }

      @Override
      public String next() {
        if (!hasNext()) {
          throw new NoSuchElementException("the stream has ended");
        }
        String text = next;
        next = "";
        return text;
      }
    };
  }

  private ChatEvent read() {
    if (error != null) {
      throw error;
    }
    while (!ended) {
      io.tokenwire.v1.StreamChatResponse message;
      try {
        message = inbox.take(() -> answer.reply(requestId));
      } catch (TokenwireException e) {
        error = e;
        throw e;
      } finally {
        Reference.reachabilityFence(this); // who waits has not dropped it
      }
      if (message == null) {
        ended = true;
        if (!answer.isComplete()) {
          error = incomplete(requestId, answer);
          throw error;
        }
        return null;
      }
      Optional<ChatEvent> event = answer.add(message);
      if (event.isPresent()) {
        if (timeToFirstToken == null && hasToken(event.get())) {
          timeToFirstToken = Duration.ofNanos(System.nanoTime() - started);
        }
        return event.get();
      }
    }
    return null;
  }

  static TokenwireException incomplete(String requestId, Accumulator answer) {
    return TokenwireException.incomplete(
        "the stream ended with OK but without its trailer: the answer is not whole",
        requestId,
        answer.reply(requestId));
  }

  private static boolean hasToken(ChatEvent event) {
    var delta = event.proto().getDelta();
    return !event.text().isEmpty()
        || !delta.getReasoning().isEmpty()
        || !delta.getRefusal().isEmpty()
        || delta.getToolCallsCount() > 0;
  }

  /** The choices so far, by index. */
  @Override
  public List<Choice> choices() {
    return answer.choices();
  }

  /**
   * Model, upstream, attempts.
   *
   * @return the header; empty before the first event
   */
  public Optional<ReplyHeader> header() {
    return answer.header();
  }

  /**
   * Tokens used.
   *
   * @return the usage; empty until the stream is complete
   */
  public Optional<Usage> usage() {
    return answer.usage();
  }

  /**
   * The call's {@code x-request-id}.
   *
   * @return the identifier
   */
  public String requestId() {
    return requestId;
  }

  /**
   * Time from the call to the first text, reasoning or tool call, measured here.
   *
   * @return the time; empty before that
   */
  public Optional<Duration> timeToFirstToken() {
    return Optional.ofNullable(timeToFirstToken);
  }

  /**
   * Whether the whole answer is here.
   *
   * @return whether it is
   */
  public boolean isComplete() {
    return answer.isComplete();
  }

  /**
   * The whole answer, as {@link TokenwireClient#chat(ChatParams)} returns it. Reads what is left of
   * the stream, and ends the call in any case.
   *
   * @return the reply
   * @throws TokenwireException if the stream failed
   */
  public Reply reply() {
    closing(this, event -> {}); // it is in the answer
    return answer.reply(requestId);
  }

  /**
   * Ends the call, if it has not ended. What was read stays; a loop that goes on gets nothing more,
   * and throws CANCELLED.
   */
  @Override
  public void close() {
    inbox.cancel();
  }
}
