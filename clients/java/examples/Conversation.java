import io.tokenwire.ChatEvent;
import io.tokenwire.ChatStream;
import io.tokenwire.Message;
import io.tokenwire.TokenwireClient;
import io.tokenwire.TokenwireException;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;

/** A conversation at the terminal: streams each answer; an empty line or Ctrl-D ends. */
public final class Conversation {
  private Conversation() {}

  /**
   * Talks.
   *
   * @param args the model, as wanted
   * @throws IOException if standard input cannot be read
   */
  public static void main(String[] args) throws IOException {
    String model = args.length > 0 ? args[0] : "gpt-4o-mini";
    BufferedReader in =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    List<Message> conversation = new ArrayList<>();
    try (TokenwireClient client = TokenwireClient.create()) {
      while (true) {
        System.out.print("> ");
        System.out.flush();
        String question = in.readLine();
        if (question == null || question.isBlank()) {
          return;
        }
        conversation.add(Message.user(question));
        try (ChatStream stream = client.stream(c -> c.model(model).messages(conversation))) {
          try {
            for (ChatEvent event : stream) {
              System.out.print(event.text());
              System.out.flush();
            }
          } catch (TokenwireException e) {
            System.out.print(" [" + e.getMessage() + "]");
          }
          System.out.println();
          // What has arrived is what the person has seen: keep it in any case.
          conversation.add(Message.assistant(stream.text()));
        }
      }
    }
  }
}
