package io.tokenwire;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.grpc.ManagedChannelBuilder;
import io.tokenwire.testing.Delta;
import io.tokenwire.testing.FakeGateway;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import org.junit.jupiter.api.Tag;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.parallel.Execution;
import org.junit.jupiter.api.parallel.ExecutionMode;

/** A silent stream lives, through a proxy that drops what is silent. */
@Execution(ExecutionMode.CONCURRENT) // they wait
class IdleTest {
  /** Passes bytes on, and closes a connection that was silent for too long, as proxies do. */
  private static final class Proxy implements AutoCloseable {
    private final ServerSocket listening;
    private final List<Socket> sockets = new CopyOnWriteArrayList<>();
    private final int patience;

    Proxy(String target, Duration patience) throws IOException {
      this.patience = (int) patience.toMillis();
      listening = new ServerSocket(0, 50, InetAddress.getLoopbackAddress());
      int port = Integer.parseInt(target.substring(target.indexOf(':') + 1));
      start(
          () -> {
            while (true) {
              Socket from = listening.accept();
              Socket to = new Socket(InetAddress.getLoopbackAddress(), port);
              sockets.addAll(List.of(from, to));
              from.setSoTimeout(this.patience); // the caller's side: it is the one to ping
              start(() -> pass(from, to));
              start(() -> pass(to, from));
            }
          });
    }

    private interface Work {
      void run() throws IOException;
    }

    private static void start(Work work) {
      Thread thread =
          new Thread(
              () -> {
                try {
                  work.run();
                } catch (IOException e) {
                  return; // closed
                }
              });
      thread.setDaemon(true);
      thread.start();
    }

    private static void pass(Socket from, Socket to) throws IOException {
      byte[] buffer = new byte[8192];
      try (from;
          to) {
        InputStream in = from.getInputStream();
        OutputStream out = to.getOutputStream();
        for (int n = in.read(buffer); n >= 0; n = in.read(buffer)) {
          out.write(buffer, 0, n);
        }
      }
    }

    String target() {
      return listening.getInetAddress().getHostAddress() + ":" + listening.getLocalPort();
    }

    @Override
    public void close() throws IOException {
      listening.close();
      for (Socket socket : sockets) {
        socket.close();
      }
    }
  }

  private static String heard(
      Duration silence, Duration patience, Consumer<ManagedChannelBuilder<?>> options)
      throws IOException {
    try (FakeGateway gateway = new FakeGateway();
        Proxy proxy = new Proxy(gateway.target(), patience);
        TokenwireClient client =
            TokenwireClient.builder(proxy.target()).channelCustomizer(options).build()) {
      gateway.reply(Delta.text("still "), Delta.pause(silence), Delta.text("here"));
      try (ChatStream stream = client.stream(c -> c.model("any").user("Hi"))) {
        return stream.reply().text();
      }
    }
  }

  /** The default options but for the interval, a third of it: the least that gRPC for Java takes. */
  @Test
  void aSilentStreamLives() throws IOException {
    assertEquals(
        "still here",
        heard(
            Duration.ofSeconds(24),
            Duration.ofSeconds(17),
            channel -> channel.keepAliveTime(10, TimeUnit.SECONDS)));
  }

  @Test
  void aConnectionWithoutCallsLivesToo() throws Exception {
    try (FakeGateway gateway = new FakeGateway();
        Proxy proxy = new Proxy(gateway.target(), Duration.ofSeconds(17));
        TokenwireClient client =
            TokenwireClient.builder(proxy.target())
                .channelCustomizer(channel -> channel.keepAliveTime(10, TimeUnit.SECONDS))
                .build()) {
      client.models();
      Thread.sleep(24_000);
      client.models();
      assertEquals(2, proxy.sockets.size(), "both ends of one connection");
    }
  }

  @Test
  void withoutPingsItDoesNot() {
    TokenwireException e =
        assertThrows(
            TokenwireException.class,
            () ->
                heard(
                    Duration.ofSeconds(24),
                    Duration.ofSeconds(3),
                    channel -> channel.keepAliveTime(1, TimeUnit.HOURS)));
    assertEquals("still ", e.partialText());
  }

  @Test
  @Tag("idle")
  @Timeout(240)
  void aStreamLivesThroughTwoMinutesOfSilence() throws IOException {
    assertEquals(
        "still here", heard(Duration.ofSeconds(120), Duration.ofSeconds(50), channel -> {}));
  }
}
