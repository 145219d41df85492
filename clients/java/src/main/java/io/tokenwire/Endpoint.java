package io.tokenwire;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.Grpc;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.tokenwire.v1.ChatServiceGrpc;
import io.tokenwire.v1.ModelServiceGrpc;
import io.tokenwire.v1.TokenizerServiceGrpc;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.stream.Stream;

/** How a client reaches its gateway: address, channel options, retries, the bearer token. */
final class Endpoint {
  static final String VERSION = "0.1.0";
  static final String DEFAULT_TARGET = "localhost:50051";

  /** Largest message in either direction: room for inline images. The gateway has the same. */
  static final int MAX_MESSAGE_BYTES = 32 * 1024 * 1024;

  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  private Endpoint() {}

  static ManagedChannel open(
      String target,
      ChannelCredentials credentials,
      Consumer<ManagedChannelBuilder<?>> customizer) {
    if (target.matches("(?i)(https?|grpcs?)://.*")) {
      throw new IllegalArgumentException(
          "target: expected HOST:PORT, without a scheme, got '" + target + "'");
    }
    ManagedChannelBuilder<?> builder =
        Grpc.newChannelBuilder(target, credentials)
            .userAgent("tokenwire-java/" + VERSION)
            .defaultServiceConfig(serviceConfig())
            .enableRetry()
            // A request that does not fit is not retried: the default of 1 MiB excludes images.
            .perRpcBufferLimit(MAX_MESSAGE_BYTES)
            .retryBufferSize(4L * MAX_MESSAGE_BYTES)
            .maxInboundMessageSize(MAX_MESSAGE_BYTES)
            // A model may think for minutes in silence. These pings notice a dead connection, and
            // keep proxies from dropping a live one; the gateway allows one per 10 s.
            .keepAliveTime(30, TimeUnit.SECONDS)
            .keepAliveTimeout(20, TimeUnit.SECONDS)
            .keepAliveWithoutCalls(true);
    customizer.accept(builder);
    return builder.build();
  }

  /**
   * Calls are retried only when the gateway (or no gateway) answered UNAVAILABLE before the first
   * byte of an answer: gRPC commits a call once its headers arrive. The gateway sends {@code
   * grpc-retry-pushback-ms: -1} when it has used up its own retries, which ends these too. No other
   * code is retried: it would repeat what is billed, or what cannot succeed.
   */
  static Map<String, ?> serviceConfig() {
    List<Map<String, String>> names =
        Stream.of(
                ChatServiceGrpc.getChatMethod(),
                ChatServiceGrpc.getStreamChatMethod(),
                ChatServiceGrpc.getBatchChatMethod(),
                TokenizerServiceGrpc.getCountTokensMethod(),
                TokenizerServiceGrpc.getTokenizeMethod(),
                ModelServiceGrpc.getListModelsMethod(),
                ModelServiceGrpc.getGetModelMethod())
            .map(
                method ->
                    Map.of(
                        "service", method.getServiceName(), "method", method.getBareMethodName()))
            .toList();
    return Map.of(
        "loadBalancingConfig",
        List.of(Map.of("round_robin", Map.of())),
        "methodConfig",
        List.of(
            Map.of(
                "name",
                names,
                "retryPolicy",
                Map.of(
                    "maxAttempts",
                    3.0,
                    "initialBackoff",
                    "0.2s",
                    "maxBackoff",
                    "5s",
                    "backoffMultiplier",
                    2.0,
                    "retryableStatusCodes",
                    List.of("UNAVAILABLE")))),
        // Retries end while half of these are used up: a failure costs one, and ten calls that
        // succeed earn one. Enough for the calls of a replica that dies, not for an outage.
        "retryThrottling",
        Map.of("maxTokens", 100.0, "tokenRatio", 0.1));
  }

  /**
   * Says who calls. A plain header rather than call credentials: gRPC refuses those on a plaintext
   * channel, which is what a client behind a service mesh has. Asks once per call: retries are
   * below this.
   */
  static ClientInterceptor bearer(Supplier<String> token) {
    return new ClientInterceptor() {
      @Override
      public <Q, R> ClientCall<Q, R> interceptCall(
          MethodDescriptor<Q, R> method, CallOptions options, Channel next) {
        return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
          @Override
          public void start(Listener<R> listener, Metadata headers) {
            String current = Checked.token(token.get());
            if (!current.isEmpty()) {
              headers.put(AUTHORIZATION, "Bearer " + current);
            }
            super.start(listener, headers);
          }
        };
      }
    };
  }
}
