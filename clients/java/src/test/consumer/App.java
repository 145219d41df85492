import io.tokenwire.ChatEvent;
import io.tokenwire.ChatStream;
import io.tokenwire.TokenwireClient;
import io.tokenwire.TokenwireException;
import io.tokenwire.testing.Failure;
import io.tokenwire.testing.FakeGateway;
import java.util.List;

/** What somebody writes in an empty folder, with the published jar alone. */
public final class App {
  private App() {}

  /**
   * Prints what each kind of call gives.
   *
   * @param args none
   */
  public static void main(String[] args) {
    try (FakeGateway gateway = new FakeGateway();
        TokenwireClient client = gateway.client()) {
      gateway.reply("Hello", " world").reply("{\"city\": \"Oslo\"}");
      gateway.fail(Failure.of("UPSTREAM_STREAM_INTERRUPTED"), "Hel");
      try (ChatStream stream = client.stream(c -> c.model("any").user("Hi"))) {
        for (ChatEvent event : stream) {
          System.out.print(event.text());
        }
        System.out.println(" " + stream.usage().get().totalTokens());
      }
      record Place(String city) {}

      System.out.println(
          client.chatAsync(c -> c.model("any").user("Where?")).join().json(Place.class).city());
      try {
        client.stream(c -> c.model("any").user("Hi")).reply();
      } catch (TokenwireException e) {
        System.out.println(e.reason() + " " + e.partialText());
      }
      System.out.println(client.tokenize("any", List.of("a b")).get(0).ids());
    }
  }
}
