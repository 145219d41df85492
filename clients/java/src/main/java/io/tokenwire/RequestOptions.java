package io.tokenwire;

import io.grpc.Metadata;
import java.time.Duration;
import java.util.Optional;
import java.util.UUID;

/** How to make one call: deadline, request id, metadata. Immutable. */
public final class RequestOptions {
  /** What holds unless something else is given. */
  public static final RequestOptions DEFAULT = builder().build();

  private final Duration timeout;
  private final boolean unlimited;
  private final String requestId;
  private final Metadata metadata;
  private final boolean cumulative;
  private final Duration maxDelay;

  private RequestOptions(Builder builder) {
    timeout = builder.timeout;
    unlimited = builder.unlimited;
    requestId = builder.requestId;
    metadata = new Metadata();
    metadata.merge(builder.metadata);
    cumulative = builder.cumulative;
    maxDelay = builder.maxDelay;
  }

  /**
   * Begins with nothing set.
   *
   * @return a builder
   */
  public static Builder builder() {
    return new Builder();
  }

  /** What the call may take: its own, or `otherwise` where it says nothing. */
  Optional<Duration> timeout(Duration otherwise) {
    return unlimited
        ? Optional.empty()
        : Optional.ofNullable(timeout != null ? timeout : otherwise);
  }

  String requestId() {
    return requestId != null ? requestId : UUID.randomUUID().toString().replace("-", "");
  }

  Metadata metadata() {
    return metadata;
  }

  boolean isCumulative() {
    return cumulative;
  }

  Optional<Duration> maxDelay() {
    return Optional.ofNullable(maxDelay);
  }

  RequestOptions notOfStream() {
    if (cumulative || maxDelay != null) {
      throw new IllegalArgumentException("cumulative, maxDelay: only a stream has them");
    }
    return this;
  }

  /** Sets how to make a call. Not for several threads at once. */
  public static final class Builder {
    private Duration timeout;
    private boolean unlimited;
    private String requestId;
    private final Metadata metadata = new Metadata();
    private boolean cumulative;
    private Duration maxDelay;

    private Builder() {}

    /**
     * Sets how long the call may take; it then fails with DEADLINE_EXCEEDED.
     *
     * @param timeout more than 0
     * @return this
     */
    public Builder timeout(Duration timeout) {
      this.timeout = Checked.positive(timeout, "timeout");
      unlimited = false;
      return this;
    }

    /**
     * Lets the call take as long as it likes.
     *
     * @return this
     */
    public Builder noTimeout() {
      unlimited = true;
      return this;
    }

    /**
     * Sets the {@code x-request-id}, to find the call in the gateway's log. One is made up
     * otherwise.
     *
     * @param requestId printable ASCII
     * @return this
     */
    public Builder requestId(String requestId) {
      this.requestId = Checked.printable(requestId, "requestId");
      return this;
    }

    /**
     * Adds gRPC metadata, such as {@code traceparent}.
     *
     * @param name its name
     * @param value printable ASCII
     * @return this
     */
    public Builder metadata(String name, String value) {
      metadata.put(Checked.key(name), Checked.printable(value, "metadata: '" + name + "'"));
      return this;
    }

    /**
     * Makes a stream send all text so far with every event. Streams only.
     *
     * @param cumulative whether to
     * @return this
     */
    public Builder cumulative(boolean cumulative) {
      this.cumulative = cumulative;
      return this;
    }

    /**
     * Lets the gateway hold text up to this long, to send fewer, larger events. Streams only.
     *
     * @param maxDelay in [0 s, 5 s]
     * @return this
     */
    public Builder maxDelay(Duration maxDelay) {
      this.maxDelay = Checked.set(maxDelay, "maxDelay");
      return this;
    }

    /**
     * Makes the options; the builder may be used on.
     *
     * @return the options
     */
    public RequestOptions build() {
      return new RequestOptions(this);
    }
  }
}
