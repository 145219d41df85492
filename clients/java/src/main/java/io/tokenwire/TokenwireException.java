package io.tokenwire;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.tokenwire.v1.ChatResponse;
import java.util.List;
import java.util.Map;
import java.util.Optional;

/** A call that failed: what it said, decoded. The only exception that a call itself throws. */
public final class TokenwireException extends RuntimeException {
  /** The only reason this client makes itself: the server said OK, yet did not finish. */
  public static final String STREAM_INCOMPLETE = "STREAM_INCOMPLETE";

  private static final String INTERRUPTED = "UPSTREAM_STREAM_INTERRUPTED";

  static final Metadata.Key<String> REQUEST_ID =
      Metadata.Key.of("x-request-id", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private static final long serialVersionUID = 1;

  /**
   * One field the server did not accept.
   *
   * @param field path in the request, for example {@code messages[0].role}
   * @param description what was there and what was expected
   */
  public record FieldViolation(String field, String description) {
    @Override
    public String toString() {
      return field + ": " + description;
    }
  }

  /** What the server said. */
  private final com.google.rpc.Status proto;

  /** The reason this client gives; "" for the server's. */
  private final String ownReason;

  /** Time to wait that the trailers told; null for none. */
  private final Long pushbackMillis;

  /** The request id, unless the server tells another. */
  private final String ownRequestId;

  /** What had arrived of a stream; else null. */
  private final ChatResponse partial;

  private TokenwireException(
      com.google.rpc.Status proto,
      String ownReason,
      Long pushbackMillis,
      String ownRequestId,
      ChatResponse partial,
      Throwable cause) {
    super(proto.getMessage(), cause);
    this.proto = proto;
    this.ownReason = ownReason;
    this.pushbackMillis = pushbackMillis;
    this.ownRequestId = ownRequestId;
    this.partial = partial;
  }

  /** What a finished call stands for. */
  static TokenwireException of(Status status, Metadata trailers, String requestId, Reply partial) {
    com.google.rpc.Status.Builder proto = com.google.rpc.Status.newBuilder();
    byte[] details = trailers.get(DETAILS);
    if (details != null) {
      try {
        proto.mergeFrom(details);
      } catch (InvalidProtocolBufferException e) {
        proto.clear(); // somebody else's details: the code and the message still hold
      }
    }
    proto.setCode(status.getCode().value()).setMessage(told(status));
    String echoed = trailers.get(REQUEST_ID);
    boolean begun = partial != null && !partial.choices().isEmpty();
    boolean broken = details == null && status.getCode() == Status.Code.UNAVAILABLE;
    return new TokenwireException(
        proto.build(),
        // Amid an answer nobody was left to give a reason: it is the one the gateway would give.
        begun && broken ? INTERRUPTED : "",
        millis(Pushback.in(trailers)),
        echoed != null ? echoed : requestId,
        partial == null ? null : partial.proto(),
        status.getCause());
  }

  /** Of a connection that failed gRPC says "io exception"; what happened is in the deepest cause. */
  private static String told(Status status) {
    String message = status.getDescription();
    Throwable cause = status.getCause();
    if (cause == null) {
      return message == null ? "no message" : message;
    }
    while (cause.getCause() != null && cause.getCause() != cause) {
      cause = cause.getCause();
    }
    String why = cause.getMessage() == null ? cause.toString() : cause.getMessage();
    // Netty's pipeline, on lines of its own, is no help to callers.
    return message == null ? why : message.lines().findFirst().orElse("") + ": " + why;
  }

  /** What a google.rpc.Status stands for. */
  static TokenwireException of(com.google.rpc.Status status, String requestId) {
    return new TokenwireException(status, "", null, requestId, null, null);
  }

  /** The server said OK and did not finish: a wrong OK is worse than any error. */
  static TokenwireException incomplete(String message, String requestId, Reply partial) {
    return new TokenwireException(
        com.google.rpc.Status.newBuilder()
            .setCode(Status.Code.INTERNAL.value())
            .setMessage(message)
            .build(),
        STREAM_INCOMPLETE,
        null,
        requestId,
        partial == null ? null : partial.proto(),
        null);
  }

  private static Long millis(String text) {
    if (text == null || !text.matches("[0-9]{1,18}") || Long.parseLong(text) == 0) {
      return null;
    }
    return Long.valueOf(text);
  }

  /**
   * The gRPC status code.
   *
   * @return the code
   */
  public Status.Code code() {
    Status.Code code = Status.fromCodeValue(proto.getCode()).getCode();
    return code == Status.Code.OK ? Status.Code.UNKNOWN : code;
  }

  /**
   * Why, as a name from the contract's {@code ErrorReason} without its prefix.
   *
   * @return for example {@code RATE_LIMITED}; "" when the status did not come from a gateway (no
   *     connection, a proxy, a deadline that passed here); {@link #STREAM_INCOMPLETE} when the
   *     server ended with OK before the answer was whole; {@code UPSTREAM_STREAM_INTERRUPTED} also
   *     of a stream whose connection broke amid its answer
   */
  public String reason() {
    return ownReason.isEmpty() ? info().getReason() : ownReason;
  }

  /**
   * How long to wait before another try.
   *
   * @return the time; empty when nobody said
   */
  public Optional<java.time.Duration> retryAfter() {
    Optional<RetryInfo> told = detail(RetryInfo.class);
    if (told.isPresent()) {
      Duration delay = told.get().getRetryDelay();
      return Optional.of(java.time.Duration.ofSeconds(delay.getSeconds(), delay.getNanos()));
    }
    return Optional.ofNullable(pushbackMillis).map(java.time.Duration::ofMillis);
  }

  /**
   * The call's {@code x-request-id}, to quote to whoever runs the gateway.
   *
   * @return the identifier
   */
  public String requestId() {
    return info().getMetadataOrDefault("requestId", ownRequestId);
  }

  /**
   * Upstream requests the gateway made for this call.
   *
   * @return how many; 0 when it did not say
   */
  public int attempts() {
    String text = metadata().getOrDefault("attempts", "");
    return text.matches("[0-9]{1,9}") ? Integer.parseInt(text) : 0;
  }

  /**
   * What else the gateway says: {@code upstream}, {@code upstreamStatus}, {@code trail}, ...
   *
   * @return names to values
   */
  public Map<String, String> metadata() {
    return info().getMetadataMap();
  }

  /**
   * The fields that were not accepted.
   *
   * @return the fields, in order
   */
  public List<FieldViolation> fieldViolations() {
    return detail(BadRequest.class).stream()
        .flatMap(refused -> refused.getFieldViolationsList().stream())
        .map(each -> new FieldViolation(each.getField(), each.getDescription()))
        .toList();
  }

  /**
   * Of a stream, what had arrived before it failed.
   *
   * @return the part; empty for calls that are no stream
   */
  public Optional<Reply> partial() {
    return Optional.ofNullable(partial).map(part -> new Reply(part, requestId(), JsonCodec.gson()));
  }

  /**
   * Text of the first choice that had arrived.
   *
   * @return the text; "" when none had
   */
  public String partialText() {
    return partial().map(Reply::text).orElse("");
  }

  /**
   * Whether the same call may succeed later, after {@link #retryAfter} if that is there. The
   * connection and the gateway have made their own retries by then. Repeating a stream repeats, and
   * bills, the part that had arrived.
   *
   * @return whether it may
   */
  public boolean isRetryable() {
    if (code() == Status.Code.RESOURCE_EXHAUSTED) {
      // Without a time to wait for, what is exhausted does not refill by itself: credit, or a
      // request larger than the limit.
      return retryAfter().isPresent();
    }
    return code() == Status.Code.UNAVAILABLE;
  }

  /**
   * The message of the contract, with every detail as it was sent.
   *
   * @return the message
   */
  public com.google.rpc.Status proto() {
    return proto;
  }

  /**
   * What the server said, alone; {@link #getMessage} adds the facts.
   *
   * @return one line for people
   */
  public String description() {
    return proto.getMessage().isEmpty() ? "no message" : proto.getMessage();
  }

  /**
   * One line for people, with what helps to find the call: reason, message, attempts, request id.
   *
   * @return the line; a further one for each field that was not accepted
   */
  @Override
  public String getMessage() {
    StringBuilder line = new StringBuilder(reason().isEmpty() ? code().name() : reason());
    String message = description();
    line.append(": ").append(message);
    StringBuilder facts = new StringBuilder();
    retryAfter().ifPresent(wait -> facts.append(", retry after ").append(seconds(wait)));
    if (attempts() > 1) {
      facts.append(", ").append(attempts()).append(" attempts");
    }
    if (!requestId().isEmpty()) {
      facts.append(", request ").append(requestId());
    }
    if (!facts.isEmpty()) {
      line.append(" (").append(facts.substring(2)).append(")");
    }
    for (FieldViolation violation : fieldViolations()) {
      if (!message.contains(violation.toString())) { // as when it is the only one
        line.append("\n  ").append(violation);
      }
    }
    return line.toString();
  }

  private static String seconds(java.time.Duration wait) {
    String text = String.valueOf(wait.toMillis() / 1000.0);
    return (text.endsWith(".0") ? text.substring(0, text.length() - 2) : text) + " s";
  }

  private ErrorInfo info() {
    return detail(ErrorInfo.class)
        .filter(info -> info.getDomain().equals("tokenwire"))
        .orElse(ErrorInfo.getDefaultInstance());
  }

  private <T extends Message> Optional<T> detail(Class<T> type) {
    for (Any packed : proto.getDetailsList()) {
      try {
        if (packed.is(type)) {
          return Optional.of(packed.unpack(type));
        }
      } catch (InvalidProtocolBufferException e) {
        continue; // a damaged detail is no reason to hide the error it came with
      }
    }
    return Optional.empty();
  }
}
