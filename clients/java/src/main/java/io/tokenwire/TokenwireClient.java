package io.tokenwire;

import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptors;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.MethodDescriptor;
import io.grpc.TlsChannelCredentials;
import io.tokenwire.v1.BatchChatResponse;
import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.ChatServiceGrpc;
import io.tokenwire.v1.CountTokensRequest;
import io.tokenwire.v1.GetModelRequest;
import io.tokenwire.v1.GetModelResponse;
import io.tokenwire.v1.ListModelsRequest;
import io.tokenwire.v1.ListModelsResponse;
import io.tokenwire.v1.ModelServiceGrpc;
import io.tokenwire.v1.StreamChatRequest;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.StreamMode;
import io.tokenwire.v1.TokenizeRequest;
import io.tokenwire.v1.TokenizerServiceGrpc;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.function.BiConsumer;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.function.Supplier;

/**
 * A client of a Tokenwire gateway. It holds one connection per gateway replica: make one, share it
 * between threads, and close it. Every failed call throws {@link TokenwireException}; a request
 * that makes no sense throws {@link IllegalArgumentException} before anything is sent.
 */
public final class TokenwireClient implements AutoCloseable {
  /** How long a call with one answer may take when nobody said: long answers take minutes. */
  public static final Duration DEFAULT_TIMEOUT = Duration.ofSeconds(600);

  private final ManagedChannel connection;
  private final Channel channel;
  private final Duration timeout;
  private final JsonCodec json;
  private final Set<Call<?, ?>> live = ConcurrentHashMap.newKeySet();

  private TokenwireClient(Builder builder) {
    Supplier<String> token = builder.bearer(); // may refuse: before there is something to close
    connection = Endpoint.open(builder.address(), builder.credentials, builder.customizer);
    channel =
        ClientInterceptors.intercept(connection, Pushback.INTERCEPTOR, Endpoint.bearer(token));
    timeout = builder.timeout;
    json = builder.json;
  }

  /**
   * Begins with a gateway's address.
   *
   * @param target {@code host:port}, or another target of gRPC such as {@code dns:///host:port}
   * @return a builder
   */
  public static Builder builder(String target) {
    return new Builder(Checked.text(target, "target"), System.getenv());
  }

  /**
   * Begins with the address in {@code TOKENWIRE_TARGET}, else {@code localhost:50051}.
   *
   * @return a builder
   */
  public static Builder builder() {
    return new Builder(null, System.getenv());
  }

  /**
   * Connects to {@code TOKENWIRE_TARGET}, else {@code localhost:50051}, in plaintext, with the token
   * in {@code TOKENWIRE_TOKEN}, if they are set.
   *
   * @return a client
   */
  public static TokenwireClient create() {
    return builder().build();
  }

  // --- chat

  /**
   * Asks, and waits for the whole answer.
   *
   * @param params what to ask
   * @return the answer
   * @throws TokenwireException if the call fails
   */
  public Reply chat(ChatParams params) {
    return chat(params, RequestOptions.DEFAULT);
  }

  /**
   * Asks, and waits for the whole answer.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return the answer
   * @throws TokenwireException if the call fails
   */
  public Reply chat(Consumer<ChatParams.Builder> params) {
    return chat(ChatParams.of(params));
  }

  /**
   * Asks, and waits for the whole answer.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the answer
   * @throws TokenwireException if the call fails
   */
  public Reply chat(ChatParams params, RequestOptions options) {
    Call<ChatRequest, io.tokenwire.v1.ChatResponse> call = chatCall(params, options);
    return Unary.await(call, answer -> new Reply(answer, call.requestId, json));
  }

  /**
   * Asks, without a waiting thread.
   *
   * @param params what to ask
   * @return the answer to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<Reply> chatAsync(ChatParams params) {
    return chatAsync(params, RequestOptions.DEFAULT);
  }

  /**
   * Asks, without a waiting thread.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return the answer to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<Reply> chatAsync(Consumer<ChatParams.Builder> params) {
    return chatAsync(ChatParams.of(params));
  }

  /**
   * Asks, without a waiting thread.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the answer to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<Reply> chatAsync(ChatParams params, RequestOptions options) {
    Call<ChatRequest, io.tokenwire.v1.ChatResponse> call = chatCall(params, options);
    CallFuture<Reply> future = new CallFuture<>(() -> call.cancel("the future was cancelled"));
    start(call, answer -> new Reply(answer, call.requestId, json), future::settle);
    return future;
  }

  /**
   * Asks, and gives the answer as it grows.
   *
   * @param params what to ask
   * @return the events of the answer; close it to end the call
   */
  public ChatStream stream(ChatParams params) {
    return stream(params, RequestOptions.DEFAULT);
  }

  /**
   * Asks, and gives the answer as it grows.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return the events of the answer; close it to end the call
   */
  public ChatStream stream(Consumer<ChatParams.Builder> params) {
    return stream(ChatParams.of(params));
  }

  /**
   * Asks, and gives the answer as it grows.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the events of the answer; close it to end the call
   */
  public ChatStream stream(ChatParams params, RequestOptions options) {
    return new ChatStream(streamCall(params, options), json);
  }

  /**
   * Asks, once it is subscribed to, and gives the answer as it grows, without a waiting thread.
   *
   * @param params what to ask
   * @return a publisher of the events of the answer
   */
  public ChatPublisher streamAsync(ChatParams params) {
    return streamAsync(params, RequestOptions.DEFAULT);
  }

  /**
   * Asks, once it is subscribed to, and gives the answer as it grows, without a waiting thread.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return a publisher of the events of the answer
   */
  public ChatPublisher streamAsync(Consumer<ChatParams.Builder> params) {
    return streamAsync(ChatParams.of(params));
  }

  /**
   * Asks, once it is subscribed to, and gives the answer as it grows, without a waiting thread.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return a publisher of the events of the answer
   */
  public ChatPublisher streamAsync(ChatParams params, RequestOptions options) {
    Checked.set(params, "params");
    Checked.set(options, "options");
    return new ChatPublisher(() -> streamCall(params, options), json);
  }

  private Call<ChatRequest, io.tokenwire.v1.ChatResponse> chatCall(
      ChatParams params, RequestOptions options) {
    ChatRequest request = Checked.set(params, "params").proto();
    return unary(ChatServiceGrpc.getChatMethod(), request, options);
  }

  private Call<StreamChatRequest, StreamChatResponse> streamCall(
      ChatParams params, RequestOptions options) {
    StreamChatRequest.Builder request =
        StreamChatRequest.newBuilder()
            .setChat(Checked.set(params, "params").proto())
            .setMode(
                Checked.set(options, "options").isCumulative()
                    ? StreamMode.STREAM_MODE_CUMULATIVE
                    : StreamMode.STREAM_MODE_DELTA);
    options
        .maxDelay()
        .ifPresent(
            delay ->
                request.setMaxDelay(
                    com.google.protobuf.Duration.newBuilder()
                        .setSeconds(delay.getSeconds())
                        .setNanos(delay.getNano())));
    return new Call<>(
        channel, ChatServiceGrpc.getStreamChatMethod(), request.build(), options, null, live);
  }

  // --- batch

  /**
   * Has independent conversations at once. One failed item fails no other.
   *
   * @param params what to ask
   * @return the results, each as soon as it is ready; close it to end the call
   */
  public BatchStream batch(BatchParams params) {
    return batch(params, RequestOptions.DEFAULT);
  }

  /**
   * Has independent conversations at once. One failed item fails no other.
   *
   * @param params sets what to ask
   * @return the results, each as soon as it is ready; close it to end the call
   */
  public BatchStream batch(Consumer<BatchParams.Builder> params) {
    return batch(BatchParams.of(params));
  }

  /**
   * Has independent conversations at once. One failed item fails no other.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the results, each as soon as it is ready; close it to end the call
   */
  public BatchStream batch(BatchParams params, RequestOptions options) {
    return new BatchStream(batchCall(params, options), params, json);
  }

  /**
   * Has independent conversations at once, and waits for them all.
   *
   * @param params what to ask
   * @return the results, in the order of the items; those that a failure of the whole batch left
   *     without one have it as their error
   * @throws TokenwireException if the batch fails before any result
   */
  public List<BatchResult> batchOrdered(BatchParams params) {
    return batchOrdered(params, RequestOptions.DEFAULT);
  }

  /**
   * Has independent conversations at once, and waits for them all.
   *
   * @param params sets what to ask
   * @return the results, in the order of the items
   * @throws TokenwireException if the batch fails before any result
   */
  public List<BatchResult> batchOrdered(Consumer<BatchParams.Builder> params) {
    return batchOrdered(BatchParams.of(params));
  }

  /**
   * Has independent conversations at once, and waits for them all.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the results, in the order of the items
   * @throws TokenwireException if the batch fails before any result
   */
  public List<BatchResult> batchOrdered(BatchParams params, RequestOptions options) {
    try (BatchStream results = batch(params, options)) {
      return results.ordered();
    }
  }

  private Call<?, BatchChatResponse> batchCall(BatchParams params, RequestOptions options) {
    return new Call<>(
        channel,
        ChatServiceGrpc.getBatchChatMethod(),
        Checked.set(params, "params").proto(),
        Checked.set(options, "options").notOfStream(),
        null,
        live);
  }

  // --- tokens

  /**
   * Counts the tokens of a text, without calling the model.
   *
   * @param model whose tokenizer counts
   * @param text the text as it is
   * @return the count
   * @throws TokenwireException if the call fails
   */
  public TokenCount countTokens(String model, String text) {
    return countTokens(model, text, RequestOptions.DEFAULT);
  }

  /**
   * Counts the tokens of a text, without calling the model.
   *
   * @param model whose tokenizer counts
   * @param text the text as it is
   * @param options how to make the call
   * @return the count
   * @throws TokenwireException if the call fails
   */
  public TokenCount countTokens(String model, String text, RequestOptions options) {
    return count(
        CountTokensRequest.newBuilder()
            .setModel(Checked.text(model, "model"))
            .setText(Checked.text(text, "text"))
            .build(),
        options);
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model.
   *
   * @param params the chat
   * @return the count
   * @throws TokenwireException if the call fails
   */
  public TokenCount countTokens(ChatParams params) {
    return countTokens(params, RequestOptions.DEFAULT);
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model.
   *
   * @param params the chat
   * @param options how to make the call
   * @return the count
   * @throws TokenwireException if the call fails
   */
  public TokenCount countTokens(ChatParams params, RequestOptions options) {
    ChatRequest chat = Checked.set(params, "params").proto();
    return count(
        CountTokensRequest.newBuilder().setModel(chat.getModel()).setChat(chat).build(), options);
  }

  private TokenCount count(CountTokensRequest request, RequestOptions options) {
    return Unary.await(
        unary(TokenizerServiceGrpc.getCountTokensMethod(), request, options), TokenCount::of);
  }

  /**
   * Lists the tokens of texts, without calling the model.
   *
   * @param model whose tokenizer is used
   * @param texts at most 256, each tokenized on its own
   * @return the tokens of each text, in order
   * @throws TokenwireException if the call fails
   */
  public List<Tokens> tokenize(String model, List<String> texts) {
    return tokenize(model, texts, RequestOptions.DEFAULT);
  }

  /**
   * Lists the tokens of texts, without calling the model.
   *
   * @param model whose tokenizer is used
   * @param texts at most 256, each tokenized on its own
   * @param options how to make the call
   * @return the tokens of each text, in order
   * @throws TokenwireException if the call fails
   */
  public List<Tokens> tokenize(String model, List<String> texts, RequestOptions options) {
    TokenizeRequest.Builder request =
        TokenizeRequest.newBuilder().setModel(Checked.text(model, "model"));
    Checked.set(texts, "texts").forEach(text -> request.addTexts(Checked.text(text, "texts")));
    var call = unary(TokenizerServiceGrpc.getTokenizeMethod(), request.build(), options);
    List<Tokens> lists =
        Unary.await(call, answer -> answer.getListsList().stream().map(Tokens::of).toList());
    if (lists.size() != texts.size()) {
      String told = "got the tokens of " + lists.size() + " of " + texts.size() + " texts";
      throw TokenwireException.incomplete(told, call.requestId, null);
    }
    return lists;
  }

  // --- models

  /**
   * Lists the models that can be asked.
   *
   * @return all of them, from as many pages as there are
   * @throws TokenwireException if a call fails
   */
  public List<ModelInfo> models() {
    return models(RequestOptions.DEFAULT);
  }

  /**
   * Lists the models that can be asked.
   *
   * @param options how to make each call
   * @return all of them, from as many pages as there are
   * @throws TokenwireException if a call fails
   */
  public List<ModelInfo> models(RequestOptions options) {
    List<ModelInfo> models = new ArrayList<>();
    Set<String> read = new HashSet<>(); // tokens of pages
    String token = "";
    do {
      ListModelsRequest request = ListModelsRequest.newBuilder().setPageToken(token).build();
      var call = unary(ModelServiceGrpc.getListModelsMethod(), request, options);
      ListModelsResponse page = Unary.await(call, Function.identity());
      page.getModelsList().forEach(model -> models.add(ModelInfo.of(model)));
      if (!read.add(page.getNextPageToken())) {
        String told = "the list of models goes on with a page that was read";
        throw TokenwireException.incomplete(told, call.requestId, null);
      }
      token = page.getNextPageToken();
    } while (!token.isEmpty());
    return List.copyOf(models);
  }

  /**
   * Looks up a model.
   *
   * @param name its name or alias
   * @return the model
   * @throws TokenwireException if there is none, or the call fails
   */
  public ModelInfo model(String name) {
    return model(name, RequestOptions.DEFAULT);
  }

  /**
   * Looks up a model.
   *
   * @param name its name or alias
   * @param options how to make the call
   * @return the model
   * @throws TokenwireException if there is none, or the call fails
   */
  public ModelInfo model(String name, RequestOptions options) {
    GetModelRequest request =
        GetModelRequest.newBuilder().setName(Checked.text(name, "name")).build();
    var call = unary(ModelServiceGrpc.getGetModelMethod(), request, options);
    GetModelResponse answer = Unary.await(call, Function.identity());
    if (!answer.hasModel()) {
      throw TokenwireException.incomplete("got an answer without a model", call.requestId, null);
    }
    return ModelInfo.of(answer.getModel());
  }

  // --- every call

  private <Q, R> Call<Q, R> unary(
      MethodDescriptor<Q, R> method, Q request, RequestOptions options) {
    Checked.set(options, "options").notOfStream();
    return new Call<>(channel, method, request, options, timeout, live);
  }

  private static <R, T> void start(
      Call<?, R> call, Function<? super R, T> convert, BiConsumer<T, Throwable> callback) {
    try {
      call.start(new Unary<>(call, convert, callback), 2);
    } catch (RuntimeException | Error e) { // such as from the caller's own token supplier
      callback.accept(null, e);
    }
  }

  /**
   * The connection, with the token: for the contract's own stubs.
   *
   * @return a channel that lives as long as this client
   */
  public Channel channel() {
    return channel;
  }

  /** Ends what runs, with CANCELLED, and frees the connection. */
  @Override
  public void close() {
    live.forEach(call -> call.cancel("the client was closed"));
    connection.shutdownNow();
    try {
      connection.awaitTermination(5, TimeUnit.SECONDS);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  /** Sets how to connect. */
  public static final class Builder {
    private final String target;
    private final Map<String, String> environment;
    private Supplier<String> token;
    private ChannelCredentials credentials = InsecureChannelCredentials.create();
    private Consumer<ManagedChannelBuilder<?>> customizer = unused -> {};
    private Duration timeout = DEFAULT_TIMEOUT;
    private JsonCodec json = JsonCodec.gson();

    Builder(String target, Map<String, String> environment) {
      this.target = target;
      this.environment = environment;
    }

    /**
     * Sets the bearer token. It travels as a header, so it also works in plaintext behind a mesh.
     * Without one, {@code TOKENWIRE_TOKEN} is used, if it is set.
     *
     * @param token the token; "" for none
     * @return this
     */
    public Builder token(String token) {
      String checked = Checked.token(token);
      this.token = () -> checked;
      return this;
    }

    /**
     * Sets what gives the bearer token.
     *
     * @param token gives the current token; asked once per call, on the thread that makes it
     * @return this
     */
    public Builder token(Supplier<String> token) {
      this.token = Checked.set(token, "token");
      return this;
    }

    /**
     * Encrypts, and trusts the authorities of the system. The default is plaintext.
     *
     * @return this
     */
    public Builder tls() {
      return tls(TlsChannelCredentials.create());
    }

    /**
     * Encrypts, and trusts these authorities.
     *
     * @param authorities a PEM file of certificates
     * @return this
     */
    public Builder tls(Path authorities) {
      try {
        return tls(
            TlsChannelCredentials.newBuilder()
                .trustManager(Checked.set(authorities, "authorities").toFile())
                .build());
      } catch (IOException e) {
        throw new UncheckedIOException("tls: " + e.getMessage(), e);
      }
    }

    /**
     * Encrypts, trusts these authorities, and shows a certificate of one's own.
     *
     * @param authorities a PEM file of certificates
     * @param certificate a PEM file: the client's certificate chain
     * @param key a PEM file: the client's private key, not encrypted
     * @return this
     */
    public Builder mutualTls(Path authorities, Path certificate, Path key) {
      Checked.set(authorities, "authorities");
      Checked.set(certificate, "certificate");
      Checked.set(key, "key");
      try {
        byte[] pkcs8 = PrivateKeyPem.pkcs8(Files.readAllBytes(key));
        return tls(
            TlsChannelCredentials.newBuilder()
                .trustManager(authorities.toFile())
                .keyManager(
                    new ByteArrayInputStream(Files.readAllBytes(certificate)),
                    new ByteArrayInputStream(pkcs8))
                .build());
      } catch (IOException e) {
        throw new UncheckedIOException("mutualTls: " + e.getMessage(), e);
      }
    }

    /**
     * Encrypts in a way of one's own.
     *
     * @param credentials such as of {@link TlsChannelCredentials}
     * @return this
     */
    public Builder tls(ChannelCredentials credentials) {
      this.credentials = Checked.set(credentials, "tls");
      return this;
    }

    /**
     * Sets options of gRPC's own channel, over the built-in ones.
     *
     * @param customizer such as {@code b -> b.keepAliveTime(1, TimeUnit.MINUTES)}
     * @return this
     */
    public Builder channelCustomizer(Consumer<ManagedChannelBuilder<?>> customizer) {
      this.customizer = Checked.set(customizer, "channelCustomizer");
      return this;
    }

    /**
     * Sets how long a call with one answer may take where its options say nothing; {@link
     * #DEFAULT_TIMEOUT} otherwise. Streams and batches have no such limit.
     *
     * @param timeout more than 0
     * @return this
     */
    public Builder timeout(Duration timeout) {
      this.timeout = Checked.positive(timeout, "timeout");
      return this;
    }

    /**
     * Sets what parses JSON, and writes tools' answers.
     *
     * @param json Gson's unless set
     * @return this
     */
    public Builder json(JsonCodec json) {
      this.json = Checked.set(json, "json");
      return this;
    }

    /**
     * Makes the client. It connects when it is first used.
     *
     * @return a client
     * @throws IllegalArgumentException if the address or the token cannot be one
     */
    public TokenwireClient build() {
      return new TokenwireClient(this);
    }

    private String address() {
      String address = target != null ? target : environment.getOrDefault("TOKENWIRE_TARGET", "");
      if (target != null && target.isEmpty()) {
        throw new IllegalArgumentException(
            "target: expected an address such as \"" + Endpoint.DEFAULT_TARGET + "\"");
      }
      return address.isEmpty() ? Endpoint.DEFAULT_TARGET : address;
    }

    private Supplier<String> bearer() {
      if (token != null) {
        return token;
      }
      String fromEnvironment = Checked.token(environment.getOrDefault("TOKENWIRE_TOKEN", ""));
      return () -> fromEnvironment;
    }
  }
}
