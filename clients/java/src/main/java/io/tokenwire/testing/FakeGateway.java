package io.tokenwire.testing;

import com.google.protobuf.ByteString;
import com.google.protobuf.Message;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.ForwardingServerCall.SimpleForwardingServerCall;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import io.tokenwire.Accumulator;
import io.tokenwire.FinishReason;
import io.tokenwire.TokenwireClient;
import io.tokenwire.v1.BatchChatItem;
import io.tokenwire.v1.BatchChatRequest;
import io.tokenwire.v1.BatchChatResponse;
import io.tokenwire.v1.ChatMessage;
import io.tokenwire.v1.ChatRequest;
import io.tokenwire.v1.ChatResponse;
import io.tokenwire.v1.ChatServiceGrpc;
import io.tokenwire.v1.CountTokensRequest;
import io.tokenwire.v1.CountTokensResponse;
import io.tokenwire.v1.Finish;
import io.tokenwire.v1.GetModelRequest;
import io.tokenwire.v1.GetModelResponse;
import io.tokenwire.v1.ListModelsRequest;
import io.tokenwire.v1.ListModelsResponse;
import io.tokenwire.v1.Model;
import io.tokenwire.v1.ModelServiceGrpc;
import io.tokenwire.v1.ResponseHeader;
import io.tokenwire.v1.Snapshot;
import io.tokenwire.v1.StreamChatRequest;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.StreamMode;
import io.tokenwire.v1.StreamTrailer;
import io.tokenwire.v1.TokenList;
import io.tokenwire.v1.TokenizeRequest;
import io.tokenwire.v1.TokenizeResponse;
import io.tokenwire.v1.TokenizerServiceGrpc;
import io.tokenwire.v1.Usage;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;

/**
 * A gateway inside your test process: real gRPC on a loopback port, answers from a script.
 *
 * <pre>{@code
 * try (FakeGateway gateway = new FakeGateway(); TokenwireClient client = gateway.client()) {
 *   gateway.reply("Hello", " world");
 *   assertEquals("Hello world", client.chat(c -> c.model("any").user("Hi")).text());
 * }
 * }</pre>
 *
 * <p>It speaks the contract as the gateway does (order of events, error details, trailers), except
 * where a test asks it not to ({@link #cut}). It calls no model and counts words as tokens. Each
 * Chat, StreamChat, retry of one, or item of a BatchChat takes the next answer of the script; a call
 * that finds none fails with INTERNAL.
 */
public final class FakeGateway implements AutoCloseable {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<String> REQUEST_ID =
      Metadata.Key.of("x-request-id", Metadata.ASCII_STRING_MARSHALLER);
  private static final Context.Key<Incoming> INCOMING = Context.key("incoming");
  private static final int MAX_MESSAGE_BYTES = 32 * 1024 * 1024;

  private enum Ending {
    WHOLE,
    FAIL,
    CUT,
    HANG
  }

  private record Script(List<Delta> parts, Ending ending, Failure failure, FinishReason finish) {}

  /** What an interceptor knows of a call: its metadata, and where its trailers will come from. */
  private record Incoming(Map<String, String> metadata, Metadata trailers) {}

  private final Server server;
  private final String token;
  private final List<String> models;
  private final List<ReceivedCall> calls = new CopyOnWriteArrayList<>();
  private final Deque<Script> script = new ArrayDeque<>();

  /** A gateway for every caller, with the model {@code gpt-4o-mini}. */
  public FakeGateway() {
    this("", List.of("gpt-4o-mini"));
  }

  /**
   * A gateway.
   *
   * @param token what callers must present; "" for no check
   * @param models the models to list and to find
   */
  public FakeGateway(String token, List<String> models) {
    this.token = token;
    this.models = List.copyOf(models);
    try {
      server =
          NettyServerBuilder.forAddress(
                  new InetSocketAddress(InetAddress.getLoopbackAddress(), 0),
                  InsecureServerCredentials.create())
              .maxInboundMessageSize(MAX_MESSAGE_BYTES)
              // As the gateway: a client may ping each 10 s, also while nothing runs.
              .permitKeepAliveTime(10, TimeUnit.SECONDS)
              .permitKeepAliveWithoutCalls(true)
              .intercept(new Reception())
              .addService(new Chats())
              .addService(new Tokenizer())
              .addService(new Models())
              .build()
              .start();
    } catch (IOException e) {
      throw new UncheckedIOException("FakeGateway: no loopback port: " + e.getMessage(), e);
    }
  }

  // --- the script

  /**
   * Answers the next call with this text.
   *
   * @param deltas the text, in pieces
   * @return this
   */
  public FakeGateway reply(String... deltas) {
    return reply(texts(deltas));
  }

  /**
   * Answers the next call with these pieces; it finishes with STOP or, after tool calls, TOOL_CALLS.
   *
   * @param deltas the pieces
   * @return this
   */
  public FakeGateway reply(Delta... deltas) {
    boolean called =
        Stream.of(deltas)
            .anyMatch(each -> each.event != null && each.event.getDelta().getToolCallsCount() > 0);
    return reply(called ? FinishReason.TOOL_CALLS : FinishReason.STOP, deltas);
  }

  /**
   * Answers the next call with these pieces.
   *
   * @param finish why it ends
   * @param deltas the pieces
   * @return this
   */
  public FakeGateway reply(FinishReason finish, Delta... deltas) {
    return add(new Script(List.of(deltas), Ending.WHOLE, null, finish));
  }

  /**
   * Fails the next call.
   *
   * @param reason of the contract's {@code ErrorReason}, without its prefix
   * @return this
   */
  public FakeGateway fail(String reason) {
    return fail(Failure.of(reason));
  }

  /**
   * Fails the next call.
   *
   * @param failure how
   * @return this
   */
  public FakeGateway fail(Failure failure) {
    return fail(failure, new Delta[0]);
  }

  /**
   * Fails the next call; a stream, after this text.
   *
   * @param failure how
   * @param after the text, in pieces
   * @return this
   */
  public FakeGateway fail(Failure failure, String... after) {
    return fail(failure, texts(after));
  }

  /**
   * Fails the next call; a stream, after these pieces.
   *
   * @param failure how
   * @param after the pieces
   * @return this
   */
  public FakeGateway fail(Failure failure, Delta... after) {
    return add(new Script(List.of(after), Ending.FAIL, failure, FinishReason.STOP));
  }

  /**
   * Answers the next stream with this text, then ends with OK although the answer is not whole. The
   * gateway never does this; a broken proxy might. Other calls fail with
   * UPSTREAM_STREAM_INTERRUPTED.
   *
   * @param deltas the text, in pieces
   * @return this
   */
  public FakeGateway cut(String... deltas) {
    return add(new Script(List.of(texts(deltas)), Ending.CUT, null, FinishReason.STOP));
  }

  /**
   * Answers the next call with this text, then stays silent until the caller leaves.
   *
   * @param deltas the text, in pieces
   * @return this
   */
  public FakeGateway hang(String... deltas) {
    return add(new Script(List.of(texts(deltas)), Ending.HANG, null, FinishReason.STOP));
  }

  private static Delta[] texts(String... texts) {
    return Stream.of(texts).map(Delta::text).toArray(Delta[]::new);
  }

  private FakeGateway add(Script next) {
    synchronized (script) {
      script.add(next);
    }
    return this;
  }

  private Script next() {
    synchronized (script) {
      if (!script.isEmpty()) {
        return script.remove();
      }
    }
    Failure empty =
        Failure.of("INTERNAL")
            .message("FakeGateway has no answer left: script one with reply, fail, cut or hang");
    return new Script(List.of(), Ending.FAIL, empty, FinishReason.STOP);
  }

  // --- the server

  /**
   * The calls received.
   *
   * @return the calls, oldest first
   */
  public List<ReceivedCall> calls() {
    return List.copyOf(calls);
  }

  /**
   * Where to connect to.
   *
   * @return {@code host:port}
   */
  public String target() {
    return InetAddress.getLoopbackAddress().getHostAddress() + ":" + server.getPort();
  }

  /**
   * A client of this gateway, with its token.
   *
   * @return a client to close
   */
  public TokenwireClient client() {
    return TokenwireClient.builder(target()).token(token).build();
  }

  /** Cancels what runs and frees the port. */
  @Override
  public void close() {
    server.shutdownNow();
    try {
      server.awaitTermination(5, TimeUnit.SECONDS);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  /** Keeps each call's metadata at hand, and adds its trailers. */
  private static final class Reception implements ServerInterceptor {
    @Override
    public <Q, R> ServerCall.Listener<Q> interceptCall(
        ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
      Map<String, String> metadata = new HashMap<>();
      for (String name : headers.keys()) {
        if (!name.endsWith(Metadata.BINARY_HEADER_SUFFIX)) {
          metadata.put(name, headers.get(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER)));
        }
      }
      Metadata last = new Metadata();
      if (headers.get(REQUEST_ID) != null) {
        last.put(REQUEST_ID, headers.get(REQUEST_ID));
      }
      ServerCall<Q, R> answering =
          new SimpleForwardingServerCall<>(call) {
            @Override
            public void close(Status status, Metadata trailers) {
              trailers.merge(last);
              super.close(status, trailers);
            }
          };
      Incoming incoming = new Incoming(Map.copyOf(metadata), last);
      return Contexts.interceptCall(
          Context.current().withValue(INCOMING, incoming), answering, headers, next);
    }
  }

  /** Writes the call down; null if it was refused. */
  private ReceivedCall accept(String method, Message request, StreamObserver<?> out) {
    ReceivedCall call = new ReceivedCall(method, request, INCOMING.get().metadata());
    calls.add(call);
    // gRPC's own handler would wait for this thread, which may be asleep in a pause.
    Context.current().addListener(context -> call.cancelled(), Runnable::run);
    ((ServerCallStreamObserver<?>) out).setOnCancelHandler(call::cancelled);
    String expected = "Bearer " + token;
    if (!token.isEmpty()
        && !expected.equals(call.metadata().getOrDefault(AUTHORIZATION.name(), ""))) {
      fail(call, Failure.of("CALLER_UNAUTHENTICATED").message("missing or wrong token"), out);
      return null;
    }
    return call;
  }

  private static void fail(ReceivedCall call, Failure failure, StreamObserver<?> out) {
    call.answered();
    failure.addTo(INCOMING.get().trailers());
    out.onError(failure.status().asRuntimeException());
  }

  private static <R> void answer(ReceivedCall call, R response, StreamObserver<R> out) {
    call.answered();
    out.onNext(response);
    out.onCompleted();
  }

  // --- chat

  private List<Delta> events(Script script, ChatRequest chat) {
    List<Delta> events = new ArrayList<>();
    ResponseHeader.Builder header =
        ResponseHeader.newBuilder()
            .setId("fake-" + calls.size())
            .setModel(chat.getModel())
            .setUpstream("fake");
    events.add(Delta.of(StreamChatResponse.newBuilder().setHeader(header).build()));
    events.addAll(script.parts());
    if (script.ending() != Ending.WHOLE) {
      return events;
    }
    TreeSet<Integer> open = new TreeSet<>();
    StringBuilder text = new StringBuilder();
    for (Delta part : script.parts()) {
      if (part.event != null && part.event.hasDelta()) {
        open.add(part.event.getDelta().getChoiceIndex());
        text.append(part.event.getDelta().getContent());
      }
    }
    if (open.isEmpty()) {
      open.add(0);
    }
    for (Delta part : script.parts()) {
      if (part.event != null && part.event.hasFinish()) {
        open.remove(part.event.getFinish().getChoiceIndex());
      }
    }
    for (int index : open) {
      Finish.Builder finish =
          Finish.newBuilder()
              .setChoiceIndex(index)
              .setFinishReason(
                  io.tokenwire.v1.FinishReason.valueOf("FINISH_REASON_" + script.finish().name()))
              .setFinishReasonRaw(script.finish().name().toLowerCase(java.util.Locale.ROOT));
      events.add(Delta.of(StreamChatResponse.newBuilder().setFinish(finish).build()));
    }
    int asked = chat.getMessagesList().stream().mapToInt(each -> words(each.getContent())).sum();
    int said = words(text.toString());
    Usage.Builder usage =
        Usage.newBuilder()
            .setPromptTokens(asked)
            .setCompletionTokens(said)
            .setTotalTokens(asked + said)
            .setEstimated(true);
    StreamTrailer.Builder trailer = StreamTrailer.newBuilder().setUsage(usage);
    events.add(Delta.of(StreamChatResponse.newBuilder().setTrailer(trailer).build()));
    return events;
  }

  private static int words(String text) {
    return text.isBlank() ? 0 : text.strip().split("\\s+").length;
  }

  /** The whole answer of a script; null when the caller left meanwhile. */
  private ChatResponse fold(Script script, ChatRequest chat, ReceivedCall call) {
    Accumulator answer = new Accumulator();
    for (Delta part : events(script, chat)) {
      if (part.event != null) {
        answer.add(part.event);
      } else if (!call.pause(part.pause)) {
        return null;
      }
    }
    return answer.reply().proto();
  }

  private static Failure failure(Script script) {
    return script.ending() == Ending.CUT
        ? Failure.of("UPSTREAM_STREAM_INTERRUPTED").message("cut by the test")
        : script.failure();
  }

  private final class Chats extends ChatServiceGrpc.ChatServiceImplBase {
    @Override
    public void chat(ChatRequest request, StreamObserver<ChatResponse> out) {
      ReceivedCall call = accept("Chat", request, out);
      if (call == null) {
        return;
      }
      Script script = next();
      switch (script.ending()) {
        case HANG -> {
          return; // until the caller leaves
        }
        case FAIL, CUT -> fail(call, failure(script), out);
        case WHOLE -> {
          ChatResponse response = fold(script, request, call);
          if (response != null) {
            answer(call, response, out);
          }
        }
      }
    }

    @Override
    public void streamChat(StreamChatRequest request, StreamObserver<StreamChatResponse> out) {
      ReceivedCall call = accept("StreamChat", request, out);
      if (call == null) {
        return;
      }
      Script script = next();
      if (script.ending() == Ending.FAIL && script.parts().isEmpty()) {
        fail(call, script.failure(), out); // without headers: a client may retry
        return;
      }
      boolean cumulative = request.getMode() == StreamMode.STREAM_MODE_CUMULATIVE;
      Accumulator answer = new Accumulator();
      for (Delta part : events(script, request.getChat())) {
        if (part.event == null) {
          if (!call.pause(part.pause)) {
            return;
          }
          continue;
        }
        if (((ServerCallStreamObserver<?>) out).isCancelled()) {
          return;
        }
        answer.add(part.event);
        out.onNext(cumulative && part.event.hasDelta() ? snapshot(answer, part) : part.event);
      }
      switch (script.ending()) {
        case HANG -> {
          return;
        }
        case FAIL -> fail(call, script.failure(), out);
        case WHOLE, CUT -> {
          call.answered();
          out.onCompleted();
        }
      }
    }

    private StreamChatResponse snapshot(Accumulator answer, Delta part) {
      int index = part.event.getDelta().getChoiceIndex();
      ChatMessage message =
          answer.choices().stream()
              .filter(choice -> choice.index() == index)
              .findFirst()
              .orElseThrow()
              .message()
              .proto();
      Snapshot.Builder snapshot =
          Snapshot.newBuilder()
              .setState(Snapshot.State.STATE_STREAMING)
              .setChoiceIndex(index)
              .setMessage(message);
      return StreamChatResponse.newBuilder().setSnapshot(snapshot).build();
    }

    @Override
    public void batchChat(BatchChatRequest request, StreamObserver<BatchChatResponse> out) {
      ReceivedCall call = accept("BatchChat", request, out);
      if (call == null) {
        return;
      }
      List<Script> scripts = request.getItemsList().stream().map(unused -> next()).toList();
      // Last item first: results come in order of completion, and code that takes it for the
      // order of the items should notice in a test.
      for (int index = scripts.size() - 1; index >= 0; index--) {
        BatchChatItem item = request.getItems(index);
        Script script = scripts.get(index);
        BatchChatResponse.Builder result =
            BatchChatResponse.newBuilder().setIndex(index).setCustomId(item.getCustomId());
        switch (script.ending()) {
          case HANG -> {
            return;
          }
          case FAIL, CUT -> result.setError(failure(script).proto());
          case WHOLE -> {
            ChatResponse response = fold(script, item.getChat(), call);
            if (response == null) {
              return;
            }
            result.setResponse(response);
          }
        }
        out.onNext(result.build());
      }
      call.answered();
      out.onCompleted();
    }
  }

  // --- tokens

  private final class Tokenizer extends TokenizerServiceGrpc.TokenizerServiceImplBase {
    @Override
    public void countTokens(CountTokensRequest request, StreamObserver<CountTokensResponse> out) {
      ReceivedCall call = accept("CountTokens", request, out);
      if (call == null) {
        return;
      }
      int tokens = words(request.getText());
      for (ChatMessage message : request.getChat().getMessagesList()) {
        tokens += words(message.getContent());
      }
      answer(
          call,
          CountTokensResponse.newBuilder().setTotalTokens(tokens).setTokenizer("words").build(),
          out);
    }

    @Override
    public void tokenize(TokenizeRequest request, StreamObserver<TokenizeResponse> out) {
      ReceivedCall call = accept("Tokenize", request, out);
      if (call == null) {
        return;
      }
      TokenizeResponse.Builder response = TokenizeResponse.newBuilder().setTokenizer("words");
      for (String text : request.getTextsList()) {
        TokenList.Builder list = TokenList.newBuilder();
        int id = 0;
        for (String word : text.strip().split("\\s+")) {
          if (!word.isEmpty()) {
            list.addIds(id++).addPieces(ByteString.copyFromUtf8(word));
          }
        }
        response.addLists(list);
      }
      answer(call, response.build(), out);
    }
  }

  // --- models

  private final class Models extends ModelServiceGrpc.ModelServiceImplBase {
    @Override
    public void listModels(ListModelsRequest request, StreamObserver<ListModelsResponse> out) {
      ReceivedCall call = accept("ListModels", request, out);
      if (call == null) {
        return;
      }
      int start = request.getPageToken().isEmpty() ? 0 : Integer.parseInt(request.getPageToken());
      int size = request.getPageSize() == 0 ? 100 : request.getPageSize();
      int end = Math.min(start + size, models.size());
      ListModelsResponse.Builder response = ListModelsResponse.newBuilder();
      models.subList(start, end).forEach(name -> response.addModels(model(name)));
      if (end < models.size()) {
        response.setNextPageToken(String.valueOf(end));
      }
      answer(call, response.build(), out);
    }

    @Override
    public void getModel(GetModelRequest request, StreamObserver<GetModelResponse> out) {
      ReceivedCall call = accept("GetModel", request, out);
      if (call == null) {
        return;
      }
      if (!models.contains(request.getName())) {
        fail(call, Failure.of("MODEL_NOT_FOUND").message("no model " + request.getName()), out);
        return;
      }
      answer(call, GetModelResponse.newBuilder().setModel(model(request.getName())).build(), out);
    }

    private Model model(String name) {
      return Model.newBuilder()
          .setName(name)
          .setUpstream("fake")
          .setUpstreamModel(name)
          .setTokenizer("words")
          .build();
    }
  }
}
