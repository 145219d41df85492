package io.tokenwire.testing;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Set;

/** How a {@link FakeGateway} fails a call: as the gateway does, unless told otherwise. */
public final class Failure {
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);
  private static final Metadata.Key<String> PUSHBACK =
      Metadata.Key.of("grpc-retry-pushback-ms", Metadata.ASCII_STRING_MARSHALLER);

  /** What another instance may serve at once: the gateway leaves these to the client's retries. */
  private static final Set<String> ELSEWHERE = Set.of("GATEWAY_OVERLOADED", "GATEWAY_DRAINING");

  /** The status code that goes with each reason, as error_reason.proto says. */
  static final Map<String, Status.Code> CODES =
      Map.ofEntries(
          Map.entry("INVALID_REQUEST", Status.Code.INVALID_ARGUMENT),
          Map.entry("CONTEXT_LENGTH_EXCEEDED", Status.Code.INVALID_ARGUMENT),
          Map.entry("UNSUPPORTED_PARAMETER", Status.Code.INVALID_ARGUMENT),
          Map.entry("UNKNOWN_ROLE", Status.Code.INVALID_ARGUMENT),
          Map.entry("REQUEST_TOO_LARGE", Status.Code.RESOURCE_EXHAUSTED),
          Map.entry("CONTENT_FILTERED", Status.Code.INVALID_ARGUMENT),
          Map.entry("MODEL_NOT_FOUND", Status.Code.NOT_FOUND),
          Map.entry("CALLER_UNAUTHENTICATED", Status.Code.UNAUTHENTICATED),
          Map.entry("CALLER_FORBIDDEN", Status.Code.PERMISSION_DENIED),
          Map.entry("CALLER_QUOTA_EXCEEDED", Status.Code.RESOURCE_EXHAUSTED),
          Map.entry("RATE_LIMITED", Status.Code.RESOURCE_EXHAUSTED),
          Map.entry("UPSTREAM_QUOTA_EXHAUSTED", Status.Code.RESOURCE_EXHAUSTED),
          Map.entry("UPSTREAM_CREDENTIALS_REJECTED", Status.Code.FAILED_PRECONDITION),
          Map.entry("UPSTREAM_ACCESS_DENIED", Status.Code.FAILED_PRECONDITION),
          Map.entry("UPSTREAM_UNREACHABLE", Status.Code.UNAVAILABLE),
          Map.entry("UPSTREAM_TIMEOUT", Status.Code.UNAVAILABLE),
          Map.entry("UPSTREAM_OVERLOADED", Status.Code.UNAVAILABLE),
          Map.entry("UPSTREAM_ERROR", Status.Code.UNAVAILABLE),
          Map.entry("UPSTREAM_PROTOCOL_ERROR", Status.Code.UNAVAILABLE),
          Map.entry("UPSTREAM_STREAM_INTERRUPTED", Status.Code.UNAVAILABLE),
          Map.entry("GATEWAY_OVERLOADED", Status.Code.UNAVAILABLE),
          Map.entry("GATEWAY_DRAINING", Status.Code.UNAVAILABLE),
          Map.entry("DEADLINE_EXCEEDED", Status.Code.DEADLINE_EXCEEDED),
          Map.entry("CANCELLED", Status.Code.CANCELLED),
          Map.entry("CALLER_STALLED", Status.Code.ABORTED),
          Map.entry("TOKENIZER_UNAVAILABLE", Status.Code.FAILED_PRECONDITION),
          Map.entry("INTERNAL", Status.Code.INTERNAL));

  private final String reason;
  private final Status.Code code;
  private final String message;
  private final ErrorInfo info;
  private final List<Any> details;
  private final java.time.Duration retryAfter;
  private final Long pushbackMillis;

  private Failure(
      String reason,
      Status.Code code,
      String message,
      ErrorInfo info,
      List<Any> details,
      java.time.Duration retryAfter,
      Long pushbackMillis) {
    this.reason = reason;
    this.code = code;
    this.message = message;
    this.info = info;
    this.details = details;
    this.retryAfter = retryAfter;
    this.pushbackMillis = pushbackMillis;
  }

  /**
   * A failure of the gateway.
   *
   * @param reason of the contract's {@code ErrorReason}, without its prefix
   * @return the failure, with the status code of that reason
   * @throws IllegalArgumentException if there is no such reason
   */
  public static Failure of(String reason) {
    Status.Code code = CODES.get(reason);
    if (code == null) {
      throw new IllegalArgumentException("reason: no such ErrorReason: " + reason);
    }
    ErrorInfo info = ErrorInfo.newBuilder().setReason(reason).setDomain("tokenwire").build();
    return new Failure(reason, code, "scripted by the test", info, List.of(), null, null);
  }

  /**
   * A status without details, as a proxy sends.
   *
   * @param code the status code
   * @return the failure
   */
  public static Failure of(Status.Code code) {
    return new Failure("", code, "scripted by the test", null, List.of(), null, null);
  }

  /**
   * The same, with this message.
   *
   * @param text one line for people
   * @return the failure
   */
  public Failure message(String text) {
    return new Failure(reason, code, text, info, details, retryAfter, pushbackMillis);
  }

  /**
   * The same, which tells when to try again.
   *
   * @param time how long to wait
   * @return the failure
   */
  public Failure retryAfter(java.time.Duration time) {
    RetryInfo detail =
        RetryInfo.newBuilder()
            .setRetryDelay(
                Duration.newBuilder().setSeconds(time.getSeconds()).setNanos(time.getNano()))
            .build();
    return new Failure(reason, code, message, info, with(Any.pack(detail)), time, pushbackMillis);
  }

  /**
   * The same, which names a field that was not accepted.
   *
   * @param field its path, for example {@code params.temperature}
   * @param description what was there and what was expected
   * @return the failure
   */
  public Failure fieldViolation(String field, String description) {
    BadRequest detail =
        BadRequest.newBuilder()
            .addFieldViolations(
                BadRequest.FieldViolation.newBuilder().setField(field).setDescription(description))
            .build();
    return new Failure(
        reason, code, message, info, with(Any.pack(detail)), retryAfter, pushbackMillis);
  }

  /**
   * The same, with a fact such as {@code attempts}.
   *
   * @param key its name
   * @param value its value
   * @return the failure
   */
  public Failure metadata(String key, String value) {
    ErrorInfo more =
        (info == null ? ErrorInfo.newBuilder() : info.toBuilder()).putMetadata(key, value).build();
    return new Failure(reason, code, message, more, details, retryAfter, pushbackMillis);
  }

  /**
   * The same, with what the client's own retries are told. Unless set it is the gateway's way:
   * silence where another instance may help, else the time to wait, else -1, for no retry.
   *
   * @param millis milliseconds, -1 for no retry
   * @return the failure
   */
  public Failure pushback(long millis) {
    return new Failure(reason, code, message, info, details, retryAfter, millis);
  }

  private List<Any> with(Any detail) {
    List<Any> more = new ArrayList<>(details);
    more.add(detail);
    return List.copyOf(more);
  }

  com.google.rpc.Status proto() {
    com.google.rpc.Status.Builder status =
        com.google.rpc.Status.newBuilder().setCode(code.value()).setMessage(message);
    if (info != null) {
      status.addDetails(Any.pack(info));
    }
    return status.addAllDetails(details).build();
  }

  Status status() {
    return code.toStatus().withDescription(message);
  }

  void addTo(Metadata trailers) {
    com.google.rpc.Status proto = proto();
    if (proto.getDetailsCount() > 0) {
      trailers.put(DETAILS, proto.toByteArray());
    }
    Long millis = pushbackMillis;
    if (millis == null && !reason.isEmpty() && !ELSEWHERE.contains(reason)) {
      millis = retryAfter == null ? -1L : retryAfter.toMillis();
    }
    if (millis != null) {
      trailers.put(PUSHBACK, millis.toString());
    }
  }
}
