package io.tokenwire.testing;

import com.google.protobuf.Message;
import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.StreamChatRequest;
import java.time.Duration;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

/** One call as it arrived at a {@link FakeGateway}. */
public final class ReceivedCall {
  private final String method;
  private final Message request;
  private final Map<String, String> metadata;
  private final CountDownLatch over = new CountDownLatch(1);
  private volatile boolean answered;
  private volatile boolean left;

  ReceivedCall(String method, Message request, Map<String, String> metadata) {
    this.method = method;
    this.request = request;
    this.metadata = metadata;
  }

  /**
   * Which call this is.
   *
   * @return for example {@code StreamChat}
   */
  public String method() {
    return method;
  }

  /**
   * The request as it arrived.
   *
   * @return a message of the contract
   */
  public Message request() {
    return request;
  }

  /**
   * The chat in the request of Chat and StreamChat.
   *
   * @return the chat
   * @throws IllegalStateException of another call
   */
  public ChatRequest chat() {
    if (request instanceof StreamChatRequest stream) {
      return stream.getChat();
    }
    if (request instanceof ChatRequest chat) {
      return chat;
    }
    throw new IllegalStateException(method + " has no chat of its own: see request()");
  }

  /**
   * The metadata that came with it.
   *
   * @return lower-case names to text; binary values are left out
   */
  public Map<String, String> metadata() {
    return metadata;
  }

  /**
   * Waits for the end of the call.
   *
   * @param atMost how long to wait
   * @return whether the caller left before the answer was whole
   * @throws InterruptedException if the waiting thread is interrupted
   */
  public boolean awaitCancelled(Duration atMost) throws InterruptedException {
    return over.await(atMost.toMillis(), TimeUnit.MILLISECONDS) && left;
  }

  void answered() {
    answered = true;
    over.countDown();
  }

  void cancelled() {
    left |= !answered;
    over.countDown();
  }

  /** Waits so long, or for the caller to leave; whether the caller is still there. */
  boolean pause(Duration time) {
    try {
      return !over.await(time.toMillis(), TimeUnit.MILLISECONDS);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
      return false;
    }
  }

  @Override
  public String toString() {
    return "ReceivedCall[" + method + "]";
  }
}
