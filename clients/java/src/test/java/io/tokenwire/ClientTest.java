package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.MessageLite;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.HandlerRegistry;
import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.ServerMethodDefinition;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCalls;
import io.tokenwire.testing.Delta;
import io.tokenwire.testing.Failure;
import io.tokenwire.testing.FakeGateway;
import io.tokenwire.testing.ReceivedCall;
import io.tokenwire.v1.BatchChatResponse;
import io.tokenwire.v1.ChatResponse;
import io.tokenwire.v1.ChatServiceGrpc;
import io.tokenwire.v1.GetModelResponse;
import io.tokenwire.v1.ListModelsResponse;
import io.tokenwire.v1.ModelServiceGrpc;
import io.tokenwire.v1.StreamChatResponse;
import io.tokenwire.v1.TokenList;
import io.tokenwire.v1.TokenizeResponse;
import io.tokenwire.v1.TokenizerServiceGrpc;
import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import java.util.function.BooleanSupplier;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.function.Supplier;
import java.util.logging.Handler;
import java.util.logging.Level;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import java.util.stream.IntStream;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

/** The client against a gateway on a real socket. */
class ClientTest {
  private static final Duration SOON = Duration.ofSeconds(20);
  private static final ChatParams HI = ChatParams.builder().model("any").user("Hi").build();

  private final FakeGateway gateway = new FakeGateway("", List.of("a", "b"));
  private final TokenwireClient client = gateway.client();

  @AfterEach
  void close() {
    client.close();
    gateway.close();
  }

  private ReceivedCall onlyCall() {
    assertEquals(1, gateway.calls().size());
    return gateway.calls().get(0);
  }

  // --- one answer

  @Test
  void anAnswer() {
    gateway.reply("Hello", " world");
    Reply reply = client.chat(HI);
    assertEquals("Hello world", reply.text());
    assertEquals(FinishReason.STOP, reply.finishReason());
    assertEquals("any", reply.header().model());
    assertEquals(3, reply.usage().totalTokens());
    assertEquals(reply.requestId(), onlyCall().metadata().get("x-request-id"));
    assertEquals(32, reply.requestId().length());
  }

  @Test
  void aCallGetsItsOwnIdAndMetadata() {
    gateway.reply("x");
    RequestOptions options =
        RequestOptions.builder().requestId("mine").metadata("TraceParent", "00-1").build();
    assertEquals("mine", client.chat(HI, options).requestId());
    assertEquals("mine", onlyCall().metadata().get("x-request-id"));
    assertEquals("00-1", onlyCall().metadata().get("traceparent"));
  }

  @Test
  void unaryCallsHaveADeadlineAndStreamsHaveNone() {
    gateway.reply("x").reply("x").reply("x").reply("x").reply("x");
    client.chat(HI);
    client.chat(HI, RequestOptions.builder().noTimeout().build());
    client.chat(HI, RequestOptions.builder().timeout(Duration.ofSeconds(5)).build());
    try (ChatStream stream = client.stream(HI)) {
      stream.reply();
    }
    client.batchOrdered(b -> b.item("", HI));
    List<String> timeouts =
        gateway.calls().stream().map(c -> c.metadata().get("grpc-timeout")).toList();
    assertTrue(seconds(timeouts.get(0)) > 500, timeouts::toString);
    assertNull(timeouts.get(1));
    assertTrue(seconds(timeouts.get(2)) <= 5, timeouts::toString);
    assertNull(timeouts.get(3));
    assertNull(timeouts.get(4));
  }

  @Test
  void aDeadlineOfTheSurroundingsIsKept() throws Exception {
    gateway.reply("x");
    var timer = Executors.newSingleThreadScheduledExecutor();
    try {
      Context.current().withDeadlineAfter(30, TimeUnit.SECONDS, timer).call(() -> client.chat(HI));
    } finally {
      timer.shutdownNow();
    }
    assertTrue(seconds(onlyCall().metadata().get("grpc-timeout")) <= 30);
  }

  private static double seconds(String timeout) {
    double number = Double.parseDouble(timeout.substring(0, timeout.length() - 1));
    return number
        * switch (timeout.charAt(timeout.length() - 1)) {
          case 'H' -> 3600;
          case 'M' -> 60;
          case 'S' -> 1;
          case 'm' -> 1e-3;
          case 'u' -> 1e-6;
          default -> 1e-9;
        };
  }

  @Test
  void aDeadlineEndsTheCallAtTheGateway() throws Exception {
    gateway.hang();
    TokenwireException e =
        assertThrows(
            TokenwireException.class,
            () ->
                client.chat(HI, RequestOptions.builder().timeout(Duration.ofMillis(300)).build()));
    assertEquals(Status.Code.DEADLINE_EXCEEDED, e.code());
    assertEquals("", e.reason());
    assertFalse(e.isRetryable());
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void aFutureIsAnswered() throws Exception {
    gateway.reply("a").fail("CONTENT_FILTERED").hang();
    assertEquals("a", client.chatAsync(HI).get(20, TimeUnit.SECONDS).text());
    CompletionException e =
        assertThrows(CompletionException.class, () -> client.chatAsync(HI).join());
    assertEquals("CONTENT_FILTERED", ((TokenwireException) e.getCause()).reason());
    CompletableFuture<Reply> cancelled = client.chatAsync(HI);
    awaitCalls(3);
    cancelled.cancel(true);
    assertTrue(gateway.calls().get(2).awaitCancelled(SOON));
  }

  @Test
  void aFutureThatRunsOutOfTimeEndsItsCall() throws Exception {
    gateway.hang();
    CompletableFuture<Reply> late = client.chatAsync(HI).orTimeout(2, TimeUnit.SECONDS);
    awaitCalls(1);
    assertThrows(CompletionException.class, late::join);
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  private void awaitCalls(int count) throws InterruptedException {
    for (int i = 0; i < 2000 && gateway.calls().size() < count; i++) {
      Thread.sleep(10);
    }
    assertEquals(count, gateway.calls().size());
  }

  @Test
  void anInterruptedThreadLeavesItsCall() throws Exception {
    gateway.hang();
    AtomicReference<Throwable> thrown = new AtomicReference<>();
    AtomicReference<Boolean> flag = new AtomicReference<>();
    Thread thread =
        new Thread(
            () -> {
              try {
                client.chat(HI);
              } catch (TokenwireException e) {
                thrown.set(e);
                flag.set(Thread.currentThread().isInterrupted());
              }
            });
    thread.start();
    awaitCalls(1);
    thread.interrupt();
    thread.join(20_000);
    assertEquals(
        Status.Code.CANCELLED, assertInstanceOf(TokenwireException.class, thrown.get()).code());
    assertTrue(flag.get());
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void closingTheClientEndsWhatRuns() throws Exception {
    gateway.hang();
    CompletableFuture<Reply> waiting = client.chatAsync(HI);
    awaitCalls(1);
    client.close();
    CompletionException e = assertThrows(CompletionException.class, waiting::join);
    assertEquals(Status.Code.CANCELLED, ((TokenwireException) e.getCause()).code());
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void aBigMessageGoesBothWaysAndIsTriedAgain() {
    String big = "x".repeat(10_000_000);
    gateway.fail("GATEWAY_OVERLOADED").reply(big);
    assertEquals(big, client.chat(c -> c.model("any").user(big)).text());
    assertEquals(2, gateway.calls().size());
  }

  // --- streams

  @Test
  void aStreamGrowsIntoWhatChatReturns() {
    Delta[] parts = {
      Delta.reasoning("hm"),
      Delta.text("He"),
      Delta.text(1, "other"),
      Delta.of(StreamChatResponse.getDefaultInstance()), // a heartbeat
      Delta.text("llo"),
      Delta.toolCall(0, "c0", "f", Map.of("n", 9007199254740993L))
    };
    gateway.reply(parts).reply(parts);
    Reply whole = client.chat(HI);
    try (ChatStream stream = client.stream(HI)) {
      List<ChatEvent.Kind> kinds = new ArrayList<>();
      StringBuilder text = new StringBuilder();
      for (ChatEvent event : stream) {
        kinds.add(event.kind());
        text.append(event.choiceIndex() == 0 ? event.text() : "");
      }
      assertEquals("Hello", text.toString());
      assertEquals("Hello", stream.text());
      assertEquals("hm", stream.reasoning());
      assertEquals("other", stream.choices().get(1).text());
      assertEquals(9007199254740993L, stream.toolCalls().get(0).arguments().get("n"));
      assertEquals(
          List.of("HEADER", "DELTA", "DELTA", "DELTA", "DELTA", "DELTA", "FINISH", "FINISH"),
          kinds.subList(0, 8).stream().map(Enum::name).toList());
      assertEquals(ChatEvent.Kind.TRAILER, kinds.get(8));
      assertTrue(stream.timeToFirstToken().isPresent());
      assertTrue(stream.isComplete());
      assertEquals(
          whole.proto().toBuilder().clearHeader().build(),
          stream.reply().proto().toBuilder().clearHeader().build());
    }
  }

  @Test
  void aCumulativeStreamSaysTheSame() {
    gateway.reply("He", "llo");
    RequestOptions options = RequestOptions.builder().cumulative(true).build();
    try (ChatStream stream = client.stream(HI, options)) {
      assertEquals(
          List.of("", "He", "llo", "", ""),
          StreamSupport.stream(stream.spliterator(), false).map(ChatEvent::text).toList());
      assertEquals("Hello", stream.reply().text());
    }
  }

  @Test
  void onlyTheText() {
    gateway.reply(Delta.text("a"), Delta.text(1, "not"), Delta.text(""), Delta.text("b"));
    try (ChatStream stream = client.stream(HI)) {
      List<String> texts = new ArrayList<>();
      stream.texts().forEach(texts::add);
      assertEquals(List.of("a", "b"), texts);
    }
  }

  @Test
  void theTimeToTheFirstTokenCountsWhateverTheModelSays() {
    for (Delta part :
        List.of(
            Delta.text("a"),
            Delta.reasoning("hm"),
            Delta.of(io.tokenwire.v1.Delta.newBuilder().setRefusal("no").build()),
            Delta.toolCall("f", Map.of()))) {
      gateway.reply(Delta.text(""), part);
      List<Boolean> known = new ArrayList<>();
      try (ChatStream stream = client.stream(HI)) {
        stream.forEach(event -> known.add(stream.timeToFirstToken().isPresent()));
      }
      assertEquals(List.of(false, false, true), known.subList(0, 3));
    }
  }

  @Test
  void anOkWithoutTheTrailerIsAnError() {
    gateway.cut("Hel").cut("Hel");
    try (ChatStream stream = client.stream(HI)) {
      TokenwireException e = assertThrows(TokenwireException.class, stream::reply);
      assertEquals(TokenwireException.STREAM_INCOMPLETE, e.reason());
      assertEquals(Status.Code.INTERNAL, e.code());
      assertEquals("Hel", e.partialText());
      assertFalse(e.isRetryable());
      assertEquals(e, assertThrows(TokenwireException.class, stream::reply));
      assertEquals("Hel", stream.text());
    }
    CompletionException e =
        assertThrows(
            CompletionException.class, () -> client.streamAsync(HI).forEach(unused -> {}).join());
    assertEquals("STREAM_INCOMPLETE", ((TokenwireException) e.getCause()).reason());
  }

  @Test
  void anInterruptedStreamTellsWhatHadArrived() {
    gateway.fail(Failure.of("UPSTREAM_STREAM_INTERRUPTED").metadata("attempts", "2"), "Hel", "lo");
    try (ChatStream stream = client.stream(HI)) {
      TokenwireException e = assertThrows(TokenwireException.class, stream::reply);
      assertEquals("Hello", e.partialText());
      assertEquals("any", e.partial().orElseThrow().header().model());
      assertEquals(2, e.attempts());
      assertTrue(e.isRetryable());
    }
    assertEquals(1, gateway.calls().size(), "what has begun is never repeated");
  }

  @Test
  void aReaderThatIsFarBehindGetsAllThatCameBeforeTheError() {
    String[] deltas =
        IntStream.range(0, 48).mapToObj(i -> i + "x".repeat(64 * 1024)).toArray(String[]::new);
    Failure cut = Failure.of("UPSTREAM_STREAM_INTERRUPTED");
    gateway.fail(cut, deltas).fail(cut, deltas);
    List<String> seen = new ArrayList<>();
    TokenwireException e =
        assertThrows(
            TokenwireException.class,
            () -> client.stream(HI).texts().forEach(text -> slowly(seen, text)));
    assertEquals(List.of(deltas), seen);
    assertEquals(String.join("", deltas), e.partialText());
    seen.clear();
    CompletableFuture<?> whole =
        client
            .streamAsync(HI)
            .forEach(
                event -> slowly(seen, event.kind() == ChatEvent.Kind.DELTA ? event.text() : ""));
    assertThrows(CompletionException.class, whole::join);
    assertEquals(String.join("", deltas), String.join("", seen));
  }

  private static void slowly(List<String> seen, String text) {
    seen.add(text);
    try {
      Thread.sleep(5);
    } catch (InterruptedException e) {
      throw new AssertionError(e);
    }
  }

  @Test
  void leavingTryEndsTheCall() throws Exception {
    gateway.hang("one", "two");
    try (ChatStream stream = client.stream(HI)) {
      for (ChatEvent event : stream) {
        if (event.text().equals("one")) {
          break;
        }
      }
    }
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void anExceptionInTheLoopEndsTheCall() throws Exception {
    gateway.hang("one");
    assertThrows(
        IllegalStateException.class,
        () -> {
          try (ChatStream stream = client.stream(HI)) {
            for (ChatEvent event : stream) {
              throw new IllegalStateException("mine " + event);
            }
          }
        });
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void closingFromAnotherThreadWakesTheReader() throws Exception {
    gateway.hang("one");
    CountDownLatch begun = new CountDownLatch(1);
    try (ChatStream stream = client.stream(HI)) {
      Runnable leave = stream::close;
      Thread closer =
          new Thread(
              () -> {
                try {
                  begun.await();
                } catch (InterruptedException e) {
                  return;
                }
                leave.run();
              });
      closer.start();
      TokenwireException e =
          assertThrows(
              TokenwireException.class,
              () ->
                  stream.forEach(
                      event -> {
                        if (event.text().equals("one")) {
                          begun.countDown();
                        }
                      }));
      assertEquals(Status.Code.CANCELLED, e.code());
      assertEquals("one", e.partialText());
      closer.join();
    }
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  @SuppressWarnings("try") // closed early, on purpose
  void aStreamIsClosedInEveryState() throws Exception {
    gateway.hang().hang("a", "b", "c").reply("a", "b", "c").reply("whole");
    try (ChatStream before = client.stream(HI)) { // the first byte
      awaitCalls(1);
      before.close();
      before.close();
      assertEquals(
          Status.Code.CANCELLED, assertThrows(TokenwireException.class, before::reply).code());
      assertTrue(gateway.calls().get(0).awaitCancelled(SOON));
    }
    for (int i = 1; i <= 2; i++) { // what has arrived is no more given out, whole or not
      List<String> seen = new ArrayList<>();
      try (ChatStream slow = client.stream(HI)) {
        TokenwireException e =
            assertThrows(
                TokenwireException.class,
                () -> {
                  for (String text : slow.texts()) {
                    seen.add(text);
                    Thread.sleep(100);
                    slow.close();
                  }
                });
        assertEquals(Status.Code.CANCELLED, e.code());
        assertEquals("a", e.partialText());
      }
      assertEquals(List.of("a"), seen);
    }
    assertTrue(gateway.calls().get(1).awaitCancelled(SOON));
    try (ChatStream after = client.stream(HI)) {
      assertEquals("whole", after.reply().text());
      after.close();
      assertEquals("whole", after.reply().text());
      assertFalse(after.iterator().hasNext());
    }
    gateway.reply("x").hang();
    try (BatchStream batch = client.batch(b -> b.item("", HI))) {
      assertEquals("x", batch.iterator().next().get().text());
      assertFalse(batch.iterator().hasNext());
      batch.close();
      assertFalse(batch.iterator().hasNext());
    }
    try (BatchStream batch = client.batch(b -> b.item("", HI))) {
      awaitCalls(6);
      batch.close();
      TokenwireException e = assertThrows(TokenwireException.class, () -> batch.forEach(r -> {}));
      assertEquals(Status.Code.CANCELLED, e.code());
    }
    assertTrue(gateway.calls().get(5).awaitCancelled(SOON));
  }

  @Test
  void anInterruptedReaderLeavesItsStream() throws Exception {
    gateway.hang("one");
    try (ChatStream stream = client.stream(HI)) {
      Thread reader = Thread.currentThread();
      TokenwireException e =
          assertThrows(
              TokenwireException.class,
              () -> {
                for (ChatEvent event : stream) {
                  if (event.text().equals("one")) {
                    reader.interrupt();
                  }
                }
              });
      assertEquals(Status.Code.CANCELLED, e.code());
      assertTrue(Thread.interrupted());
    }
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void forEachEndsTheCallWhateverHappens() throws Exception {
    List<Consumer<TokenwireClient>> loops =
        List.of(
            c -> c.stream(HI).forEach(event -> leave()),
            c -> c.stream(HI).texts().forEach(text -> leave()),
            c -> c.batch(b -> b.item("", HI).item("", HI)).forEach(result -> leave()));
    gateway.hang("one").hang("one").hang().reply("two");
    for (int i = 0; i < loops.size(); i++) {
      Consumer<TokenwireClient> loop = loops.get(i);
      assertThrows(IllegalStateException.class, () -> loop.accept(client));
      assertTrue(gateway.calls().get(i).awaitCancelled(SOON), "loop " + i);
    }
    gateway.reply("a", "b").reply("c", "d").reply("e").reply("f");
    List<String> seen = new ArrayList<>();
    client.stream(HI).forEach(event -> seen.add(event.text()));
    client.stream(HI).texts().forEach(seen::add);
    client.batch(b -> b.item("", HI).item("", HI)).forEach(result -> seen.add(result.get().text()));
    assertEquals(List.of("", "a", "b", "", "", "c", "d", "f", "e"), seen);
  }

  private static void leave() {
    throw new IllegalStateException("mine");
  }

  @Test
  void aStreamThatWasDroppedEndsWithTheGarbageAndIsTold() throws Exception {
    LinkedBlockingQueue<LogRecord> told = new LinkedBlockingQueue<>();
    Logger logger = Logger.getLogger("io.tokenwire");
    Handler handler =
        new Handler() {
          @Override
          public void publish(LogRecord entry) {
            if (gateway.calls().stream()
                .map(call -> call.metadata().get("x-request-id"))
                .anyMatch(entry.getMessage()::contains)) { // other tests run beside this one
              told.add(entry);
            }
          }

          @Override
          public void flush() {}

          @Override
          public void close() {}
        };
    logger.addHandler(handler);
    logger.setUseParentHandlers(false);
    try {
      gateway.reply("whole").hang("closed").hang("one");
      assertEquals("whole", client.stream(HI).reply().text()); // no warning: it has ended
      try (ChatStream closed = client.stream(HI)) {
        assertEquals("closed", closed.texts().iterator().next());
      }
      assertEquals("one", firstText());
      boolean left = false;
      for (int i = 0; i < 100 && !left; i++) {
        System.gc();
        left = gateway.calls().get(2).awaitCancelled(Duration.ofMillis(100));
      }
      assertTrue(left);
      LogRecord warning = told.poll(SOON.toSeconds(), TimeUnit.SECONDS);
      assertEquals(Level.WARNING, warning.getLevel());
      String requestId = gateway.calls().get(2).metadata().get("x-request-id");
      assertTrue(warning.getMessage().contains("(request " + requestId + ")"));
      assertTrue(
          Stream.of(warning.getThrown().getStackTrace())
              .anyMatch(frame -> frame.getMethodName().equals("firstText")),
          "where it was opened");
      System.gc();
      assertNull(told.poll(200, TimeUnit.MILLISECONDS), "of that one alone");
    } finally {
      logger.setUseParentHandlers(true);
      logger.removeHandler(handler);
    }
  }

  @SuppressWarnings("resource") // on purpose
  private String firstText() {
    return client.stream(HI).texts().iterator().next();
  }

  // --- publishers

  /** Asks for as many as it is told to. */
  private static final class Reader<T> implements Flow.Subscriber<T> {
    private final Function<T, Object> shown;
    private final LinkedBlockingQueue<Object> seen = new LinkedBlockingQueue<>();
    private Flow.Subscription subscription;

    Reader(Function<T, Object> shown) {
      this.shown = shown;
    }

    @Override
    public void onSubscribe(Flow.Subscription given) {
      subscription = given;
    }

    @Override
    public void onNext(T event) {
      seen.add(shown.apply(event));
    }

    @Override
    public void onError(Throwable error) {
      seen.add(error);
    }

    @Override
    public void onComplete() {
      seen.add("complete");
    }

    Object next() throws InterruptedException {
      return seen.poll(20, TimeUnit.SECONDS);
    }
  }

  @Test
  void aPublisherGivesWhatWasAskedForAndNoMore() throws Exception {
    gateway.reply("one", "two");
    Reader<ChatEvent> reader = new Reader<>(ChatEvent::kind);
    client.streamAsync(HI).subscribe(reader);
    reader.subscription.request(2);
    assertEquals(ChatEvent.Kind.HEADER, reader.next());
    assertEquals(ChatEvent.Kind.DELTA, reader.next());
    assertNull(reader.seen.poll(300, TimeUnit.MILLISECONDS));
    reader.subscription.request(Long.MAX_VALUE);
    reader.subscription.request(Long.MAX_VALUE);
    assertEquals(ChatEvent.Kind.DELTA, reader.next());
    assertEquals(ChatEvent.Kind.FINISH, reader.next());
    assertEquals(ChatEvent.Kind.TRAILER, reader.next());
    assertEquals("complete", reader.next());
  }

  @Test
  void aCancelledSubscriptionEndsTheCall() throws Exception {
    gateway.hang("one");
    Reader<ChatEvent> reader = new Reader<>(ChatEvent::kind);
    client.streamAsync(HI).subscribe(reader);
    reader.subscription.request(2);
    reader.next();
    reader.next();
    reader.subscription.cancel();
    assertTrue(onlyCall().awaitCancelled(SOON));
    assertNull(reader.seen.poll(200, TimeUnit.MILLISECONDS), "nothing follows a cancellation");
  }

  @Test
  void aSubscriberThatAsksForNothingIsTold() throws Exception {
    gateway.hang("one");
    Reader<ChatEvent> reader = new Reader<>(ChatEvent::kind);
    client.streamAsync(HI).subscribe(reader);
    reader.subscription.request(0);
    assertInstanceOf(IllegalArgumentException.class, reader.next());
  }

  @Test
  void aConsumersExceptionEndsTheCall() throws Exception {
    gateway.hang("one");
    CompletableFuture<Reply> whole =
        client
            .streamAsync(HI)
            .forEach(
                event -> {
                  throw new IllegalStateException("mine");
                });
    CompletionException e = assertThrows(CompletionException.class, whole::join);
    assertInstanceOf(IllegalStateException.class, e.getCause());
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void aPublisherTellsWhatHadArrived() {
    gateway.fail(Failure.of("UPSTREAM_STREAM_INTERRUPTED"), "Hel");
    CompletionException e =
        assertThrows(
            CompletionException.class, () -> client.streamAsync(HI).forEach(event -> {}).join());
    assertEquals("Hel", ((TokenwireException) e.getCause()).partialText());
  }

  // --- retries

  @Test
  void unavailableIsRetriedBeforeAnAnswerBegins() {
    gateway.fail(Failure.of(Status.Code.UNAVAILABLE)).fail("GATEWAY_DRAINING").reply("third");
    assertEquals("third", client.chat(HI).text());
    assertEquals(3, gateway.calls().size());
    assertEquals(
        1, gateway.calls().stream().map(c -> c.metadata().get("x-request-id")).distinct().count());
  }

  @Test
  void streamsAreRetriedToo() {
    gateway.fail("GATEWAY_OVERLOADED").reply("second");
    try (ChatStream stream = client.stream(HI)) {
      assertEquals("second", stream.reply().text());
    }
  }

  @Test
  void threeAttemptsAreEnough() {
    gateway.fail("GATEWAY_DRAINING").fail("GATEWAY_DRAINING").fail("GATEWAY_DRAINING").reply("x");
    TokenwireException e = assertThrows(TokenwireException.class, () -> client.chat(HI));
    assertEquals("GATEWAY_DRAINING", e.reason());
    assertEquals(3, gateway.calls().size());
  }

  @Test
  void pushbackIsObeyed() {
    gateway
        .fail(Failure.of("GATEWAY_OVERLOADED").pushback(700))
        .reply("second")
        .fail("UPSTREAM_ERROR");
    long started = System.nanoTime();
    assertEquals("second", client.chat(HI).text());
    assertTrue(System.nanoTime() - started >= 690_000_000L);
    assertEquals(
        "UPSTREAM_ERROR", assertThrows(TokenwireException.class, () -> client.chat(HI)).reason());
    assertEquals(3, gateway.calls().size(), "-1 means no retry");
  }

  @Test
  void otherCodesAreNotRetriedWhateverThePushback() {
    gateway.fail(Failure.of("RATE_LIMITED").retryAfter(Duration.ofMillis(10))).reply("x");
    TokenwireException e = assertThrows(TokenwireException.class, () -> client.chat(HI));
    assertEquals("RATE_LIMITED", e.reason());
    assertEquals(1, gateway.calls().size());
  }

  @Test
  void refusalsDoNotUseUpTheRetries() {
    for (int i = 0; i < 120; i++) { // the throttle has a hundred tokens
      gateway.fail("INVALID_REQUEST");
    }
    gateway.fail("GATEWAY_DRAINING").reply("again");
    for (int i = 0; i < 120; i++) {
      assertThrows(TokenwireException.class, () -> client.chat(HI));
    }
    assertEquals("again", client.chat(HI).text());
  }

  @Test
  void nothingListening() {
    gateway.close();
    TokenwireException e =
        assertThrows(
            TokenwireException.class,
            () -> client.chat(HI, RequestOptions.builder().timeout(SOON).build()));
    assertEquals(Status.Code.UNAVAILABLE, e.code());
    assertEquals("", e.reason());
    assertTrue(e.isRetryable());
    assertTrue(e.getMessage().contains("refused"), e.getMessage());
  }

  // --- batches

  @Test
  void aBatchIsReadAsItIsReady() {
    gateway.reply("zero").fail("CONTENT_FILTERED").reply("two");
    BatchParams items =
        BatchParams.builder()
            .defaults(c -> c.model("any").temperature(0))
            .prompt("0")
            .prompt("1")
            .item("last", c -> c.user("2").temperature(1))
            .build();
    List<String> seen = new ArrayList<>();
    try (BatchStream results = client.batch(items)) {
      for (BatchResult result : results) {
        seen.add(result.index() + result.customId() + result.reply().map(Reply::text).orElse("!"));
      }
    }
    assertEquals(List.of("2lasttwo", "1!", "0zero"), seen);
    assertEquals(1, items.proto().getItems(2).getChat().getParams().getTemperature());
  }

  @Test
  void aBatchInOrder() {
    gateway.reply("zero").fail("CONTENT_FILTERED").reply("two");
    List<BatchResult> results =
        client.batchOrdered(
            b -> b.defaults(c -> c.model("any")).prompt("0").prompt("1").prompt("2"));
    assertEquals("zero", results.get(0).get().text());
    assertEquals(
        "CONTENT_FILTERED", assertThrows(TokenwireException.class, results.get(1)::get).reason());
    assertEquals("two", results.get(2).get().text());
  }

  @Test
  void whatABatchLeftOpenFailsWithIt() {
    gateway.hang().reply("one");
    List<BatchResult> results =
        client.batchOrdered(
            BatchParams.builder().item("", HI).item("b", HI).build(),
            RequestOptions.builder().timeout(Duration.ofMillis(800)).build());
    assertEquals(Status.Code.DEADLINE_EXCEEDED, results.get(0).error().orElseThrow().code());
    assertEquals("one", results.get(1).get().text());
  }

  @Test
  void leavingABatchEndsIt() throws Exception {
    gateway.hang().reply("one");
    try (BatchStream results =
        client.batch(BatchParams.builder().item("", HI).item("", HI).build())) {
      assertEquals(1, results.iterator().next().index());
    }
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void aBatchThatItsCallerLeftIsNoBatchWhateverCame() {
    var items = BatchParams.builder().item("", HI).item("", HI).build().proto().getItemsList();
    var results = new BatchStream.Results("r", items, null);
    results.add(resultOf(0));
    Status left = Status.CANCELLED;
    TokenwireException failure = TokenwireException.of(left, new Metadata(), "r", null);
    assertEquals(failure, assertThrows(TokenwireException.class, () -> results.ordered(failure)));
    Status late = Status.DEADLINE_EXCEEDED;
    TokenwireException told = TokenwireException.of(late, new Metadata(), "r", null);
    assertEquals(told, results.ordered(told).get(1).error().orElseThrow());
  }

  @Test
  void anInterruptedBatchIsNoBatch() throws Exception {
    gateway.hang().reply("one");
    AtomicReference<TokenwireException> thrown = new AtomicReference<>();
    AtomicReference<Boolean> flag = new AtomicReference<>();
    Thread waiting =
        new Thread(
            () -> {
              thrown.set(
                  assertThrows(
                      TokenwireException.class,
                      () -> client.batchOrdered(b -> b.item("", HI).item("", HI))));
              flag.set(Thread.currentThread().isInterrupted());
            });
    waiting.start();
    eventually(() -> !gateway.calls().isEmpty());
    waiting.interrupt();
    waiting.join(SOON.toMillis());
    assertEquals(Status.Code.CANCELLED, thrown.get().code());
    assertTrue(flag.get());
    assertTrue(onlyCall().awaitCancelled(SOON));
  }

  @Test
  void aBatchWithoutWaitingThreads() throws Exception {
    gateway.reply("zero").fail("CONTENT_FILTERED").reply("two");
    BatchPublisher publisher = client.batchAsync(b -> b.item("", HI).item("", HI).item("last", HI));
    assertEquals(0, gateway.calls().size(), "nothing before somebody subscribes");
    Reader<BatchResult> reader = new Reader<>(result -> result.index() + result.customId());
    publisher.subscribe(reader);
    reader.subscription.request(1);
    assertEquals("2last", reader.next());
    assertNull(reader.seen.poll(200, TimeUnit.MILLISECONDS), "no more than was asked for");
    reader.subscription.request(2);
    assertEquals("1", reader.next());
    assertEquals("0", reader.next());
    assertEquals("complete", reader.next());

    gateway.reply("zero").fail("CONTENT_FILTERED").reply("two");
    List<Integer> order = new ArrayList<>();
    List<BatchResult> results =
        publisher.forEach(result -> order.add(result.index())).get(20, TimeUnit.SECONDS);
    assertEquals(List.of(2, 1, 0), order);
    assertEquals(List.of(0, 1, 2), results.stream().map(BatchResult::index).toList());
    assertEquals("CONTENT_FILTERED", results.get(1).error().orElseThrow().reason());
  }

  @Test
  void aBatchWithoutWaitingThreadsIsLeft() throws Exception {
    gateway.hang().reply("one").hang().reply("one").hang().reply("one");
    BatchPublisher publisher = client.batchAsync(b -> b.item("", HI).item("", HI));
    Reader<BatchResult> reader = new Reader<>(BatchResult::index);
    publisher.subscribe(reader);
    reader.subscription.request(5);
    assertEquals(1, reader.next());
    reader.subscription.cancel();
    assertTrue(gateway.calls().get(0).awaitCancelled(SOON));

    CountDownLatch begun = new CountDownLatch(1);
    CompletableFuture<?> cancelled = publisher.forEach(result -> begun.countDown());
    assertTrue(begun.await(20, TimeUnit.SECONDS));
    cancelled.cancel(true);
    assertTrue(gateway.calls().get(1).awaitCancelled(SOON));

    CompletableFuture<?> failed = publisher.forEach(result -> leave());
    var e = assertThrows(CompletionException.class, failed::join);
    assertInstanceOf(IllegalStateException.class, e.getCause());
    assertTrue(gateway.calls().get(2).awaitCancelled(SOON));
  }

  @Test
  void whatABatchWithoutWaitingThreadsLeftOpenFailsWithIt() {
    gateway.hang().reply("one").hang().reply("one").hang();
    RequestOptions late = RequestOptions.builder().timeout(Duration.ofMillis(800)).build();
    Consumer<BatchParams.Builder> two = b -> b.item("", HI).item("", HI);
    List<BatchResult> results = client.batchOrderedAsync(two, late).join();
    assertEquals(Status.Code.DEADLINE_EXCEEDED, results.get(0).error().orElseThrow().code());
    assertEquals("one", results.get(1).get().text());
    // Who sees each result is told of the failure as a failure.
    for (CompletableFuture<?> failed :
        List.of(
            client.batchAsync(two, late).forEach(result -> {}),
            client.batchOrderedAsync(b -> b.item("", HI), late))) {
      var e = assertThrows(CompletionException.class, failed::join);
      assertEquals(Status.Code.DEADLINE_EXCEEDED, ((TokenwireException) e.getCause()).code());
    }
  }

  // --- OKs that are none

  /** A client of a gateway whose every method answers with these messages. */
  private static void withOdd(
      Consumer<TokenwireClient> use, MessageLite message, MessageLite... more) throws Exception {
    HandlerRegistry odd =
        new HandlerRegistry() {
          @Override
          public ServerMethodDefinition<?, ?> lookupMethod(String name, String authority) {
            MethodDescriptor.Marshaller<byte[]> raw =
                new MethodDescriptor.Marshaller<>() {
                  @Override
                  public InputStream stream(byte[] value) {
                    return new ByteArrayInputStream(value);
                  }

                  @Override
                  public byte[] parse(InputStream stream) {
                    return new byte[0];
                  }
                };
            MethodDescriptor<byte[], byte[]> method =
                MethodDescriptor.<byte[], byte[]>newBuilder(raw, raw)
                    .setType(MethodDescriptor.MethodType.SERVER_STREAMING)
                    .setFullMethodName(name)
                    .build();
            return ServerMethodDefinition.create(
                method,
                ServerCalls.asyncServerStreamingCall(
                    (request, observer) -> {
                      observer.onNext(message.toByteArray());
                      for (MessageLite each : more) {
                        observer.onNext(each.toByteArray());
                      }
                      observer.onCompleted();
                    }));
          }
        };
    Server server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .fallbackHandlerRegistry(odd)
            .build()
            .start();
    try (TokenwireClient other =
        TokenwireClient.builder("localhost:" + server.getPort()).token("").build()) {
      use.accept(other);
    } finally {
      server.shutdownNow();
    }
  }

  private static void eventually(BooleanSupplier holds) throws InterruptedException {
    long end = System.nanoTime() + SOON.toNanos();
    while (!holds.getAsBoolean()) {
      assertTrue(System.nanoTime() < end, "not in time");
      Thread.sleep(5);
    }
  }

  private static BatchChatResponse resultOf(int index) {
    return BatchChatResponse.newBuilder()
        .setIndex(index)
        .setResponse(ChatResponse.getDefaultInstance())
        .build();
  }

  @Test
  void batchResultsOfNoItemOrTwoOfOneAreRefused() throws Exception {
    for (int[] indexes : new int[][] {{0, 2}, {0, -1}, {1, 1}, {7, 0}}) {
      withOdd(
          other -> {
            TokenwireException e =
                assertThrows(
                    TokenwireException.class,
                    () -> other.batchOrdered(b -> b.item("", HI).item("", HI)));
            assertEquals("STREAM_INCOMPLETE", e.reason());
            for (CompletableFuture<?> failed :
                List.of(
                    other.batchOrderedAsync(b -> b.item("", HI).item("", HI)),
                    other.batchAsync(b -> b.item("", HI).item("", HI)).forEach(result -> {}))) {
              var late = assertThrows(CompletionException.class, failed::join);
              assertEquals("STREAM_INCOMPLETE", ((TokenwireException) late.getCause()).reason());
            }
          },
          resultOf(indexes[0]),
          resultOf(indexes[1]));
    }
  }

  @Test
  void aBatchThatIsRefusedHereEndsThere() throws Exception {
    withSilent(
        (silent, calls) -> {
          CompletableFuture<?> async = silent.batchAsync(b -> b.item("", HI)).forEach(result -> {});
          eventually(() -> calls.size() == 1);
          answer(calls.get(0), resultOf(7));
          assertThrows(CompletionException.class, async::join);
          eventually(calls.get(0)::isCancelled);
          try (BatchStream results = silent.batch(b -> b.item("", HI))) {
            eventually(() -> calls.size() == 2);
            answer(calls.get(1), resultOf(7));
            assertThrows(TokenwireException.class, results.iterator()::next);
            eventually(calls.get(1)::isCancelled);
          }
        });
  }

  @SuppressWarnings("unchecked") // who asked for a batch
  private static void answer(ServerCall<?, ?> call, BatchChatResponse response) {
    call.sendHeaders(new Metadata());
    ((ServerCall<?, BatchChatResponse>) call).sendMessage(response);
  }

  @Test
  void aCallerWhoReadsNothingIsFeltByTheGateway() throws Exception {
    TALKATIVE.setLevel(Level.SEVERE); // tells at length of what was not sent when the caller left
    withSilent(
        (silent, calls) -> {
          try (ChatStream unread = silent.stream(HI)) {
            eventually(() -> !calls.isEmpty());
            ServerCall<?, StreamChatResponse> call = streaming(calls.get(0));
            call.sendHeaders(new Metadata());
            StreamChatResponse big =
                StreamChatResponse.newBuilder()
                    .setDelta(
                        io.tokenwire.v1.Delta.newBuilder().setContent("x".repeat(1024 * 1024)))
                    .build();
            int sent = 0;
            for (int quiet = 0; quiet < 50 && sent < 100; quiet++) { // a second
              for (; call.isReady() && sent < 100; sent++) {
                call.sendMessage(big);
                quiet = 0;
              }
              Thread.sleep(20);
            }
            assertTrue(sent >= 8 && sent < 40, sent + " MiB");
            assertEquals("", unread.text());
          }
        });
  }

  private static final Logger TALKATIVE =
      Logger.getLogger("io.grpc.netty.shaded.io.grpc.netty.NettyServerHandler");

  @SuppressWarnings("unchecked") // who asked for a stream
  private static ServerCall<?, StreamChatResponse> streaming(ServerCall<?, ?> call) {
    return (ServerCall<?, StreamChatResponse>) call;
  }

  @Test
  void anOkThatLacksWhatWasAskedForIsAnError() throws Exception {
    withOdd(
        other -> {
          TokenwireException e =
              assertThrows(TokenwireException.class, () -> other.tokenize("m", List.of("a", "b")));
          assertTrue(e.getMessage().contains("tokens of 1 of 2 texts"), e.getMessage());
        },
        TokenizeResponse.newBuilder().addLists(TokenList.getDefaultInstance()).build());
    withOdd(
        other -> {
          assertThrows(TokenwireException.class, () -> other.model("m"));
          assertThrows(CompletionException.class, other.modelAsync("m")::join);
        },
        GetModelResponse.getDefaultInstance());
    withOdd(
        other -> {
          assertThrows(TokenwireException.class, other::models);
          var e = assertThrows(CompletionException.class, other.modelsAsync()::join);
          assertEquals("STREAM_INCOMPLETE", ((TokenwireException) e.getCause()).reason());
        },
        ListModelsResponse.newBuilder().setNextPageToken("again").build());
  }

  @Test
  void aCancelWhileTheTokenIsAskedForNeitherWaitsNorIsLost() throws Exception {
    CountDownLatch asked = new CountDownLatch(1);
    CountDownLatch answers = new CountDownLatch(1);
    AtomicReference<Flow.Subscription> subscription = new AtomicReference<>();
    var pool = Executors.newFixedThreadPool(2);
    try (TokenwireClient other =
        TokenwireClient.builder(gateway.target())
            .token(
                () -> {
                  asked.countDown();
                  try {
                    answers.await();
                  } catch (InterruptedException e) {
                    throw new IllegalStateException(e);
                  }
                  return "t";
                })
            .build()) {
      gateway.hang("a");
      var subscribing =
          pool.submit(
              () ->
                  other
                      .streamAsync(HI)
                      .subscribe(
                          new Flow.Subscriber<>() {
                            @Override
                            public void onSubscribe(Flow.Subscription given) {
                              subscription.set(given);
                              given.request(1);
                            }

                            @Override
                            public void onNext(ChatEvent event) {}

                            @Override
                            public void onError(Throwable failure) {}

                            @Override
                            public void onComplete() {}
                          }));
      assertTrue(asked.await(SOON.toSeconds(), TimeUnit.SECONDS));
      pool.submit(() -> subscription.get().cancel()).get(SOON.toSeconds(), TimeUnit.SECONDS);
      answers.countDown();
      subscribing.get(SOON.toSeconds(), TimeUnit.SECONDS);
      other.models(); // behind the call on the same connection: had it left, it is there now
      for (ReceivedCall call : gateway.calls()) {
        if (call.method().endsWith("StreamChat")) {
          assertTrue(call.awaitCancelled(SOON), "the upstream would go on");
        }
      }
    } finally {
      answers.countDown();
      pool.shutdownNow();
    }
  }

  @Test
  void anErrorOfTheTokenSupplierEndsTheFuture() {
    Supplier<String> broken =
        () -> {
          throw new AssertionError("no token");
        };
    try (TokenwireClient other = TokenwireClient.builder(gateway.target()).token(broken).build()) {
      var failed = assertThrows(CompletionException.class, () -> other.chatAsync(HI).join());
      assertInstanceOf(AssertionError.class, failed.getCause());
      var each = other.streamAsync(HI).forEach(event -> {});
      assertInstanceOf(
          AssertionError.class, assertThrows(CompletionException.class, each::join).getCause());
    }
  }

  // --- tokens, models

  @Test
  void tokensAreCounted() {
    assertEquals(2, client.countTokens("any", "two words").totalTokens());
    assertEquals(1, client.countTokens(HI).totalTokens());
    List<Tokens> lists = client.tokenize("any", List.of("two words", ""));
    assertEquals(List.of(0, 1), lists.get(0).ids());
    assertEquals("words", new String(lists.get(0).pieces().get(1)));
    assertEquals(List.of(), lists.get(1).ids());
    assertEquals(2, client.countTokensAsync("any", "two words").join().totalTokens());
    assertEquals(1, client.countTokensAsync(HI).join().totalTokens());
    assertEquals(1, client.countTokens(c -> c.model("any").user("Hi")).totalTokens());
    assertEquals(1, client.countTokensAsync(c -> c.model("any").user("Hi")).join().totalTokens());
    List<Tokens> again = client.tokenizeAsync("any", List.of("two words", "")).join();
    assertEquals(
        lists.stream().map(Tokens::ids).toList(), again.stream().map(Tokens::ids).toList());
  }

  /** Each form of each call that takes options hands them on. */
  @Test
  void optionsComeAlong() {
    RequestOptions options = RequestOptions.builder().requestId("mine").build();
    Consumer<ChatParams.Builder> hi = c -> c.model("any").user("Hi");
    Consumer<BatchParams.Builder> one = b -> b.item("", hi);
    BatchParams batch = BatchParams.builder().item("", HI).build();
    List<Runnable> calls =
        List.of(
            () -> client.chat(HI, options),
            () -> client.chat(hi, options),
            () -> client.chatAsync(HI, options).join(),
            () -> client.chatAsync(hi, options).join(),
            () -> client.stream(HI, options).reply(),
            () -> client.stream(hi, options).reply(),
            () -> client.streamAsync(HI, options).forEach(event -> {}).join(),
            () -> client.streamAsync(hi, options).forEach(event -> {}).join(),
            () -> client.batch(batch, options).forEach(BatchResult::get),
            () -> client.batch(one, options).forEach(BatchResult::get),
            () -> client.batchOrdered(batch, options),
            () -> client.batchOrdered(one, options),
            () -> client.batchAsync(batch, options).forEach(result -> {}).join(),
            () -> client.batchAsync(one, options).forEach(result -> {}).join(),
            () -> client.batchOrderedAsync(batch, options).join(),
            () -> client.batchOrderedAsync(one, options).join(),
            () -> client.countTokens("any", "x", options),
            () -> client.countTokens(HI, options),
            () -> client.countTokensAsync("any", "x", options).join(),
            () -> client.countTokensAsync(HI, options).join(),
            () -> client.tokenize("any", List.of("x"), options),
            () -> client.tokenizeAsync("any", List.of("x"), options).join(),
            () -> client.models(options),
            () -> client.modelsAsync(options).join(),
            () -> client.model("a", options),
            () -> client.modelAsync("a", options).join());
    for (Runnable call : calls) {
      gateway.reply("x");
      call.run();
    }
    long taking =
        Stream.of(TokenwireClient.class.getMethods())
            .filter(each -> List.of(each.getParameterTypes()).contains(RequestOptions.class))
            .count();
    assertEquals(taking, calls.size(), "every method that takes options");
    assertEquals(
        Collections.nCopies(calls.size(), "mine"),
        gateway.calls().stream().map(call -> call.metadata().get("x-request-id")).toList());
  }

  @Test
  void futuresOfEachKindEndTheirCalls() throws Exception {
    RequestOptions options = RequestOptions.builder().noTimeout().build();
    withSilent(
        (silent, calls) -> {
          List<CompletableFuture<?>> futures =
              List.of(
                  silent.chatAsync(HI, options),
                  silent.streamAsync(HI, options).forEach(event -> {}),
                  silent.batchAsync(b -> b.item("", HI), options).forEach(result -> {}),
                  silent.batchOrderedAsync(b -> b.item("", HI), options),
                  silent.countTokensAsync(HI, options),
                  silent.tokenizeAsync("any", List.of("x"), options),
                  silent.modelsAsync(options),
                  silent.modelAsync("a", options));
          eventually(() -> calls.size() == futures.size());
          assertTrue(calls.stream().noneMatch(ServerCall::isCancelled));
          futures.forEach(future -> future.cancel(true));
          eventually(() -> calls.stream().allMatch(ServerCall::isCancelled));
        });
  }

  private interface Trial {
    void run(TokenwireClient client, List<ServerCall<?, ?>> calls) throws Exception;
  }

  /** A client of a gateway that hears every call and says nothing. */
  private static void withSilent(Trial trial) throws Exception {
    List<ServerCall<?, ?>> calls = new CopyOnWriteArrayList<>();
    ServerInterceptor silence =
        new ServerInterceptor() {
          @Override
          public <Q, R> ServerCall.Listener<Q> interceptCall(
              ServerCall<Q, R> call, Metadata headers, ServerCallHandler<Q, R> next) {
            calls.add(call);
            return new ServerCall.Listener<>() {};
          }
        };
    Server server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .addService(new ChatServiceGrpc.ChatServiceImplBase() {})
            .addService(new ModelServiceGrpc.ModelServiceImplBase() {})
            .addService(new TokenizerServiceGrpc.TokenizerServiceImplBase() {})
            .intercept(silence)
            .build()
            .start();
    try (TokenwireClient client =
        TokenwireClient.builder("localhost:" + server.getPort()).token("").build()) {
      trial.run(client, calls);
    } finally {
      server.shutdownNow();
    }
  }

  @Test
  void modelsComeFromEveryPage() {
    List<String> names = new ArrayList<>();
    for (int i = 0; i < 250; i++) {
      names.add("m" + i);
    }
    try (FakeGateway large = new FakeGateway("", names);
        TokenwireClient other = large.client()) {
      assertEquals(names, other.models().stream().map(ModelInfo::name).toList());
      assertEquals(3, large.calls().size());
      assertEquals(names, other.modelsAsync().join().stream().map(ModelInfo::name).toList());
      assertEquals(6, large.calls().size());
      assertEquals("m7", other.model("m7").name());
      assertEquals("m7", other.modelAsync("m7").join().name());
      TokenwireException e = assertThrows(TokenwireException.class, () -> other.model("nobody"));
      assertEquals("MODEL_NOT_FOUND", e.reason());
    }
  }

  // --- tokens of callers

  @Test
  void aTokenIsAskedForOncePerCall() {
    AtomicInteger asked = new AtomicInteger();
    try (FakeGateway guarded = new FakeGateway("good", List.of());
        TokenwireClient other =
            TokenwireClient.builder(guarded.target())
                .token(() -> asked.incrementAndGet() == 1 ? "good" : "stale")
                .build()) {
      guarded.fail("GATEWAY_DRAINING").reply("in");
      assertEquals("in", other.chat(HI).text());
      assertEquals(1, asked.get());
      TokenwireException e = assertThrows(TokenwireException.class, () -> other.chat(HI));
      assertEquals("CALLER_UNAUTHENTICATED", e.reason());
      assertEquals(Status.Code.UNAUTHENTICATED, e.code());
    }
  }

  @Test
  void aSuppliersExceptionIsTheCallers() throws Exception {
    try (TokenwireClient other =
        TokenwireClient.builder(gateway.target())
            .token(
                () -> {
                  throw new IllegalStateException("no token today");
                })
            .build()) {
      assertThrows(IllegalStateException.class, () -> other.chat(HI));
      assertThrows(IllegalStateException.class, () -> other.stream(HI));
      CompletionException e =
          assertThrows(CompletionException.class, () -> other.chatAsync(HI).join());
      assertInstanceOf(IllegalStateException.class, e.getCause());
      Reader<ChatEvent> reader = new Reader<>(ChatEvent::kind);
      other.streamAsync(HI).subscribe(reader);
      assertInstanceOf(IllegalStateException.class, reader.next());
    }
    assertEquals(0, gateway.calls().size());
  }

  @Test
  void theContractsOwnStubsCarryTheToken() {
    try (FakeGateway guarded = new FakeGateway("good", List.of());
        TokenwireClient other = guarded.client()) {
      guarded.reply("raw");
      var stub = ChatServiceGrpc.newBlockingStub(other.channel());
      assertEquals("raw", stub.chat(HI.proto()).getChoices(0).getMessage().getContent());
      guarded.fail(Failure.of("RATE_LIMITED").retryAfter(Duration.ofMillis(10))).reply("x");
      assertThrows(StatusRuntimeException.class, () -> stub.chat(HI.proto()));
      assertEquals(2, guarded.calls().size(), "only UNAVAILABLE is retried, whatever the pushback");
    }
  }

  @Test
  void aScriptThatIsUsedUpSaysSo() {
    TokenwireException e = assertThrows(TokenwireException.class, () -> client.chat(HI));
    assertTrue(e.getMessage().contains("no answer left"));
    assertNotEquals("", e.requestId());
  }
}
