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
import io.tokenwire.v1.ChatResponse;
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
import io.tokenwire.v1.TokenizeResponse;
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
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.Consumer;
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
    return chatCall(params, options).await();
  }

  /**
   * Asks, and waits for the whole answer.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @param options how to make the call
   * @return the answer
   * @throws TokenwireException if the call fails
   */
  public Reply chat(Consumer<ChatParams.Builder> params, RequestOptions options) {
    return chat(ChatParams.of(params), options);
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
    return chatCall(params, options).async();
  }

  /**
   * Asks, without a waiting thread.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @param options how to make the call
   * @return the answer to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<Reply> chatAsync(
      Consumer<ChatParams.Builder> params, RequestOptions options) {
    return chatAsync(ChatParams.of(params), options);
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
   * Asks, and gives the answer as it grows.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @param options how to make the call
   * @return the events of the answer; close it to end the call
   */
  public ChatStream stream(Consumer<ChatParams.Builder> params, RequestOptions options) {
    return stream(ChatParams.of(params), options);
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

  /**
   * Asks, once it is subscribed to, and gives the answer as it grows, without a waiting thread.
   *
   * @param params sets what to ask, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @param options how to make the call
   * @return a publisher of the events of the answer
   */
  public ChatPublisher streamAsync(Consumer<ChatParams.Builder> params, RequestOptions options) {
    return streamAsync(ChatParams.of(params), options);
  }

  private Unary<?, Reply> chatCall(ChatParams params, RequestOptions options) {
    ChatRequest request = Checked.set(params, "params").proto();
    Call<?, ChatResponse> call = call(ChatServiceGrpc.getChatMethod(), request, options);
    return new Unary<>(call, answer -> new Reply(answer, call.requestId, json));
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
   * Has independent conversations at once. One failed item fails no other.
   *
   * @param params sets what to ask
   * @param options how to make the call
   * @return the results, each as soon as it is ready; close it to end the call
   */
  public BatchStream batch(Consumer<BatchParams.Builder> params, RequestOptions options) {
    return batch(BatchParams.of(params), options);
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

  /**
   * Has independent conversations at once, and waits for them all.
   *
   * @param params sets what to ask
   * @param options how to make the call
   * @return the results, in the order of the items
   * @throws TokenwireException if the batch fails before any result
   */
  public List<BatchResult> batchOrdered(
      Consumer<BatchParams.Builder> params, RequestOptions options) {
    return batchOrdered(BatchParams.of(params), options);
  }

  /**
   * Has independent conversations at once, once it is subscribed to, without a waiting thread. One
   * failed item fails no other.
   *
   * @param params what to ask
   * @return a publisher of the results, each as soon as it is ready
   */
  public BatchPublisher batchAsync(BatchParams params) {
    return batchAsync(params, RequestOptions.DEFAULT);
  }

  /**
   * Has independent conversations at once, once it is subscribed to, without a waiting thread. One
   * failed item fails no other.
   *
   * @param params sets what to ask
   * @return a publisher of the results, each as soon as it is ready
   */
  public BatchPublisher batchAsync(Consumer<BatchParams.Builder> params) {
    return batchAsync(BatchParams.of(params));
  }

  /**
   * Has independent conversations at once, once it is subscribed to, without a waiting thread. One
   * failed item fails no other.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return a publisher of the results, each as soon as it is ready
   */
  public BatchPublisher batchAsync(BatchParams params, RequestOptions options) {
    Checked.set(params, "params");
    Checked.set(options, "options").notOfStream();
    return new BatchPublisher(() -> batchCall(params, options), params, json);
  }

  /**
   * Has independent conversations at once, once it is subscribed to, without a waiting thread. One
   * failed item fails no other.
   *
   * @param params sets what to ask
   * @param options how to make the call
   * @return a publisher of the results, each as soon as it is ready
   */
  public BatchPublisher batchAsync(Consumer<BatchParams.Builder> params, RequestOptions options) {
    return batchAsync(BatchParams.of(params), options);
  }

  /**
   * Has independent conversations at once, without a waiting thread.
   *
   * @param params what to ask
   * @return the results to come, in the order of the items; those that a failure of the whole batch left
   *     without one have it as their error. A {@link TokenwireException} if it fails before any
   *     result; cancelling it ends the call
   */
  public CompletableFuture<List<BatchResult>> batchOrderedAsync(BatchParams params) {
    return batchOrderedAsync(params, RequestOptions.DEFAULT);
  }

  /**
   * Has independent conversations at once, without a waiting thread.
   *
   * @param params sets what to ask
   * @return the results to come, in the order of the items, or a {@link TokenwireException} if the batch
   *     fails before any; cancelling it ends the call
   */
  public CompletableFuture<List<BatchResult>> batchOrderedAsync(
      Consumer<BatchParams.Builder> params) {
    return batchOrderedAsync(BatchParams.of(params));
  }

  /**
   * Has independent conversations at once, without a waiting thread.
   *
   * @param params what to ask
   * @param options how to make the call
   * @return the results to come, in the order of the items, or a {@link TokenwireException} if the batch
   *     fails before any; cancelling it ends the call
   */
  public CompletableFuture<List<BatchResult>> batchOrderedAsync(
      BatchParams params, RequestOptions options) {
    return batchAsync(params, options).ordered();
  }

  /**
   * Has independent conversations at once, without a waiting thread.
   *
   * @param params sets what to ask
   * @param options how to make the call
   * @return the results to come, in the order of the items, or a {@link TokenwireException} if the batch
   *     fails before any; cancelling it ends the call
   */
  public CompletableFuture<List<BatchResult>> batchOrderedAsync(
      Consumer<BatchParams.Builder> params, RequestOptions options) {
    return batchOrderedAsync(BatchParams.of(params), options);
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
    return countCall(model, text, options).await();
  }

  /**
   * Counts the tokens of a text, without calling the model or waiting.
   *
   * @param model whose tokenizer counts
   * @param text the text as it is
   * @return the count to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<TokenCount> countTokensAsync(String model, String text) {
    return countTokensAsync(model, text, RequestOptions.DEFAULT);
  }

  /**
   * Counts the tokens of a text, without calling the model or waiting.
   *
   * @param model whose tokenizer counts
   * @param text the text as it is
   * @param options how to make the call
   * @return the count to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<TokenCount> countTokensAsync(
      String model, String text, RequestOptions options) {
    return countCall(model, text, options).async();
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
    return countCall(params, options).await();
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model.
   *
   * @param params sets the chat, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return the count
   * @throws TokenwireException if the call fails
   */
  public TokenCount countTokens(Consumer<ChatParams.Builder> params) {
    return countTokens(ChatParams.of(params));
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model or waiting.
   *
   * @param params the chat
   * @return the count to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<TokenCount> countTokensAsync(ChatParams params) {
    return countTokensAsync(params, RequestOptions.DEFAULT);
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model or waiting.
   *
   * @param params sets the chat, such as {@code c -> c.model("gpt-4o-mini").user("Hi")}
   * @return the count to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<TokenCount> countTokensAsync(Consumer<ChatParams.Builder> params) {
    return countTokensAsync(ChatParams.of(params));
  }

  /**
   * Counts the tokens of a chat as the model sees it, without calling the model or waiting.
   *
   * @param params the chat
   * @param options how to make the call
   * @return the count to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<TokenCount> countTokensAsync(ChatParams params, RequestOptions options) {
    return countCall(params, options).async();
  }

  private Unary<?, TokenCount> countCall(String model, String text, RequestOptions options) {
    return countCall(
        CountTokensRequest.newBuilder()
            .setModel(Checked.text(model, "model"))
            .setText(Checked.text(text, "text")),
        options);
  }

  private Unary<?, TokenCount> countCall(ChatParams params, RequestOptions options) {
    ChatRequest chat = Checked.set(params, "params").proto();
    return countCall(
        CountTokensRequest.newBuilder().setModel(chat.getModel()).setChat(chat), options);
  }

  private Unary<?, TokenCount> countCall(
      CountTokensRequest.Builder request, RequestOptions options) {
    return new Unary<>(
        call(TokenizerServiceGrpc.getCountTokensMethod(), request.build(), options),
        TokenCount::of);
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
    return tokenizeCall(model, texts, options).await();
  }

  /**
   * Lists the tokens of texts, without calling the model or waiting.
   *
   * @param model whose tokenizer is used
   * @param texts at most 256, each tokenized on its own
   * @return the tokens of each text to come, in order, or a {@link TokenwireException}; cancelling it ends
   *     the call
   */
  public CompletableFuture<List<Tokens>> tokenizeAsync(String model, List<String> texts) {
    return tokenizeAsync(model, texts, RequestOptions.DEFAULT);
  }

  /**
   * Lists the tokens of texts, without calling the model or waiting.
   *
   * @param model whose tokenizer is used
   * @param texts at most 256, each tokenized on its own
   * @param options how to make the call
   * @return the tokens of each text to come, in order, or a {@link TokenwireException}; cancelling it ends
   *     the call
   */
  public CompletableFuture<List<Tokens>> tokenizeAsync(
      String model, List<String> texts, RequestOptions options) {
    return tokenizeCall(model, texts, options).async();
  }

  private Unary<?, List<Tokens>> tokenizeCall(
      String model, List<String> texts, RequestOptions options) {
    TokenizeRequest.Builder request =
        TokenizeRequest.newBuilder().setModel(Checked.text(model, "model"));
    Checked.set(texts, "texts").forEach(text -> request.addTexts(Checked.text(text, "texts")));
    int asked = request.getTextsCount();
    Call<?, TokenizeResponse> call =
        call(TokenizerServiceGrpc.getTokenizeMethod(), request.build(), options);
    return new Unary<>(
        call,
        answer -> {
          if (answer.getListsCount() != asked) {
            String told = "got the tokens of " + answer.getListsCount() + " of " + asked + " texts";
            throw TokenwireException.incomplete(told, call.requestId, null);
          }
          return answer.getListsList().stream().map(Tokens::of).toList();
        });
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
    Pages pages = new Pages();
    while (pages.areMore()) {
      pageCall(pages, options).await();
    }
    return List.copyOf(pages.models);
  }

  /**
   * Lists the models that can be asked, without a waiting thread.
   *
   * @return the models to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<List<ModelInfo>> modelsAsync() {
    return modelsAsync(RequestOptions.DEFAULT);
  }

  /**
   * Lists the models that can be asked, without a waiting thread.
   *
   * @param options how to make each call
   * @return the models to come, or a {@link TokenwireException}; cancelling it ends the call
   */
  public CompletableFuture<List<ModelInfo>> modelsAsync(RequestOptions options) {
    Pages pages = new Pages();
    AtomicReference<CompletableFuture<?>> running = new AtomicReference<>();
    CallFuture<List<ModelInfo>> all = new CallFuture<>(() -> running.get().cancel(true));
    nextPage(pages, options, running, all);
    return all;
  }

  private void nextPage(
      Pages pages,
      RequestOptions options,
      AtomicReference<CompletableFuture<?>> running,
      CallFuture<List<ModelInfo>> all) {
    CompletableFuture<ListModelsResponse> page = pageCall(pages, options).async();
    running.set(page);
    if (all.isDone()) { // cancelled just now, and so the page before
      page.cancel(true);
    }
    page.whenComplete(
        (read, error) -> {
          if (error != null) {
            all.settle(null, error);
          } else if (pages.areMore()) {
            nextPage(pages, options, running, all);
          } else {
            all.settle(List.copyOf(pages.models), null);
          }
        });
  }

  private Unary<?, ListModelsResponse> pageCall(Pages pages, RequestOptions options) {
    Call<?, ListModelsResponse> call =
        call(ModelServiceGrpc.getListModelsMethod(), pages.next(), options);
    return new Unary<>(call, page -> pages.add(page, call.requestId));
  }

  /** A list of models, page by page. */
  private static final class Pages {
    private final List<ModelInfo> models = new ArrayList<>();
    private final Set<String> read = new HashSet<>(); // tokens of pages
    private String token = "";

    ListModelsRequest next() {
      return ListModelsRequest.newBuilder().setPageToken(token).build();
    }

    ListModelsResponse add(ListModelsResponse page, String requestId) {
      page.getModelsList().forEach(model -> models.add(ModelInfo.of(model)));
      token = page.getNextPageToken();
      if (!read.add(token)) {
        String told = "the list of models goes on with a page that was read";
        throw TokenwireException.incomplete(told, requestId, null);
      }
      return page;
    }

    boolean areMore() {
      return read.isEmpty() || !token.isEmpty();
    }
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
    return modelCall(name, options).await();
  }

  /**
   * Looks up a model, without a waiting thread.
   *
   * @param name its name or alias
   * @return the model to come, or a {@link TokenwireException}, also if there is none; cancelling it ends
   *     the call
   */
  public CompletableFuture<ModelInfo> modelAsync(String name) {
    return modelAsync(name, RequestOptions.DEFAULT);
  }

  /**
   * Looks up a model, without a waiting thread.
   *
   * @param name its name or alias
   * @param options how to make the call
   * @return the model to come, or a {@link TokenwireException}, also if there is none; cancelling it ends
   *     the call
   */
  public CompletableFuture<ModelInfo> modelAsync(String name, RequestOptions options) {
    return modelCall(name, options).async();
  }

  private Unary<?, ModelInfo> modelCall(String name, RequestOptions options) {
    GetModelRequest request =
        GetModelRequest.newBuilder().setName(Checked.text(name, "name")).build();
    Call<?, GetModelResponse> call = call(ModelServiceGrpc.getGetModelMethod(), request, options);
    return new Unary<>(
        call,
        answer -> {
          if (!answer.hasModel()) {
            throw TokenwireException.incomplete(
                "got an answer without a model", call.requestId, null);
          }
          return ModelInfo.of(answer.getModel());
        });
  }

  // --- every call

  /** A call with one answer. */
  private <Q, R> Call<Q, R> call(MethodDescriptor<Q, R> method, Q request, RequestOptions options) {
    Checked.set(options, "options").notOfStream();
    return new Call<>(channel, method, request, options, timeout, live);
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
