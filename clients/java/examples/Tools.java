import io.tokenwire.ChatEvent;
import io.tokenwire.ChatStream;
import io.tokenwire.InvalidJsonException;
import io.tokenwire.Message;
import io.tokenwire.TokenwireClient;
import io.tokenwire.Tool;
import io.tokenwire.ToolCall;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/** A model that may call two functions; the answer and the calls arrive as a stream. */
public final class Tools {
  private static final Map<String, Object> WEATHER = new TreeMap<>(Map.of("Oslo", -3, "Rome", 21));

  private static final List<Tool> TOOLS =
      List.of(
          Tool.function(
              "weather",
              "Temperature in a city, in degrees Celsius",
              """
              {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
              """),
          Tool.function("cities", "Names of the cities that have a thermometer", "{}"));

  private Tools() {}

  /**
   * Asks.
   *
   * @param args the model, as wanted
   */
  public static void main(String[] args) {
    String model = args.length > 0 ? args[0] : "gpt-4o-mini";
    List<Message> conversation = new ArrayList<>();
    conversation.add(Message.user("Where is it warmer, Oslo or Rome?"));
    try (TokenwireClient client = TokenwireClient.create()) {
      boolean calling = true;
      while (calling) {
        try (ChatStream stream =
            client.stream(c -> c.model(model).messages(conversation).tools(TOOLS))) {
          for (ChatEvent event : stream) {
            System.out.print(event.text());
            System.out.flush();
          }
          System.out.println();
          conversation.add(stream.message());
          for (ToolCall call : stream.toolCalls()) {
            Object result = run(call);
            System.out.println("[" + call + " -> " + result + "]");
            conversation.add(call.answer(result));
          }
          calling = !stream.toolCalls().isEmpty();
        }
      }
    }
  }

  /** What the model asked for; an answer it understands when it asked for nonsense. */
  private static Object run(ToolCall call) {
    try {
      return switch (call.name()) {
        case "cities" -> List.copyOf(WEATHER.keySet());
        case "weather" ->
            WEATHER.getOrDefault(String.valueOf(call.arguments().get("city")), "no such city");
        default -> "no such tool: " + call.name();
      };
    } catch (InvalidJsonException e) { // let the model try again
      return e.getMessage();
    }
  }
}
