package io.tokenwire.v1;

import static io.grpc.MethodDescriptor.generateFullMethodName;

/**
 * <pre>
 * Chat with any configured model.
 * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
 * reason from `ErrorReason`).
 * </pre>
 */
@io.grpc.stub.annotations.GrpcGenerated
public final class ChatServiceGrpc {

  private ChatServiceGrpc() {}

  public static final java.lang.String SERVICE_NAME = "tokenwire.v1.ChatService";

  // Static method descriptors that strictly reflect the proto.
  private static volatile io.grpc.MethodDescriptor<io.tokenwire.v1.ChatRequest,
      io.tokenwire.v1.ChatResponse> getChatMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "Chat",
      requestType = io.tokenwire.v1.ChatRequest.class,
      responseType = io.tokenwire.v1.ChatResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.tokenwire.v1.ChatRequest,
      io.tokenwire.v1.ChatResponse> getChatMethod() {
    io.grpc.MethodDescriptor<io.tokenwire.v1.ChatRequest, io.tokenwire.v1.ChatResponse> getChatMethod;
    if ((getChatMethod = ChatServiceGrpc.getChatMethod) == null) {
      synchronized (ChatServiceGrpc.class) {
        if ((getChatMethod = ChatServiceGrpc.getChatMethod) == null) {
          ChatServiceGrpc.getChatMethod = getChatMethod =
              io.grpc.MethodDescriptor.<io.tokenwire.v1.ChatRequest, io.tokenwire.v1.ChatResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "Chat"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.ChatRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.ChatResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ChatServiceMethodDescriptorSupplier("Chat"))
              .build();
        }
      }
    }
    return getChatMethod;
  }

  private static volatile io.grpc.MethodDescriptor<io.tokenwire.v1.StreamChatRequest,
      io.tokenwire.v1.StreamChatResponse> getStreamChatMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "StreamChat",
      requestType = io.tokenwire.v1.StreamChatRequest.class,
      responseType = io.tokenwire.v1.StreamChatResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<io.tokenwire.v1.StreamChatRequest,
      io.tokenwire.v1.StreamChatResponse> getStreamChatMethod() {
    io.grpc.MethodDescriptor<io.tokenwire.v1.StreamChatRequest, io.tokenwire.v1.StreamChatResponse> getStreamChatMethod;
    if ((getStreamChatMethod = ChatServiceGrpc.getStreamChatMethod) == null) {
      synchronized (ChatServiceGrpc.class) {
        if ((getStreamChatMethod = ChatServiceGrpc.getStreamChatMethod) == null) {
          ChatServiceGrpc.getStreamChatMethod = getStreamChatMethod =
              io.grpc.MethodDescriptor.<io.tokenwire.v1.StreamChatRequest, io.tokenwire.v1.StreamChatResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "StreamChat"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.StreamChatRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.StreamChatResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ChatServiceMethodDescriptorSupplier("StreamChat"))
              .build();
        }
      }
    }
    return getStreamChatMethod;
  }

  private static volatile io.grpc.MethodDescriptor<io.tokenwire.v1.BatchChatRequest,
      io.tokenwire.v1.BatchChatResponse> getBatchChatMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "BatchChat",
      requestType = io.tokenwire.v1.BatchChatRequest.class,
      responseType = io.tokenwire.v1.BatchChatResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<io.tokenwire.v1.BatchChatRequest,
      io.tokenwire.v1.BatchChatResponse> getBatchChatMethod() {
    io.grpc.MethodDescriptor<io.tokenwire.v1.BatchChatRequest, io.tokenwire.v1.BatchChatResponse> getBatchChatMethod;
    if ((getBatchChatMethod = ChatServiceGrpc.getBatchChatMethod) == null) {
      synchronized (ChatServiceGrpc.class) {
        if ((getBatchChatMethod = ChatServiceGrpc.getBatchChatMethod) == null) {
          ChatServiceGrpc.getBatchChatMethod = getBatchChatMethod =
              io.grpc.MethodDescriptor.<io.tokenwire.v1.BatchChatRequest, io.tokenwire.v1.BatchChatResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "BatchChat"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.BatchChatRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.BatchChatResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ChatServiceMethodDescriptorSupplier("BatchChat"))
              .build();
        }
      }
    }
    return getBatchChatMethod;
  }

  /**
   * Creates a new async stub that supports all call types for the service
   */
  public static ChatServiceStub newStub(io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ChatServiceStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ChatServiceStub>() {
        @java.lang.Override
        public ChatServiceStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ChatServiceStub(channel, callOptions);
        }
      };
    return ChatServiceStub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports all types of calls on the service
   */
  public static ChatServiceBlockingV2Stub newBlockingV2Stub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ChatServiceBlockingV2Stub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ChatServiceBlockingV2Stub>() {
        @java.lang.Override
        public ChatServiceBlockingV2Stub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ChatServiceBlockingV2Stub(channel, callOptions);
        }
      };
    return ChatServiceBlockingV2Stub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports unary and streaming output calls on the service
   */
  public static ChatServiceBlockingStub newBlockingStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ChatServiceBlockingStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ChatServiceBlockingStub>() {
        @java.lang.Override
        public ChatServiceBlockingStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ChatServiceBlockingStub(channel, callOptions);
        }
      };
    return ChatServiceBlockingStub.newStub(factory, channel);
  }

  /**
   * Creates a new ListenableFuture-style stub that supports unary calls on the service
   */
  public static ChatServiceFutureStub newFutureStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ChatServiceFutureStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ChatServiceFutureStub>() {
        @java.lang.Override
        public ChatServiceFutureStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ChatServiceFutureStub(channel, callOptions);
        }
      };
    return ChatServiceFutureStub.newStub(factory, channel);
  }

  /**
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public interface AsyncService {

    /**
     * <pre>
     * Generates a whole answer.
     * </pre>
     */
    default void chat(io.tokenwire.v1.ChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.ChatResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getChatMethod(), responseObserver);
    }

    /**
     * <pre>
     * Generates an answer and sends it as it grows.
     * Order: one `header`, any number of `delta` (or `snapshot`), one `finish`
     * per choice, one `trailer`. A stream that ends without `trailer` is
     * incomplete and ends with a non-OK status. Ignore events you do not know, and
     * events that are not set: such an empty message keeps a silent stream alive.
     * </pre>
     */
    default void streamChat(io.tokenwire.v1.StreamChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.StreamChatResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getStreamChatMethod(), responseObserver);
    }

    /**
     * <pre>
     * Generates answers to independent conversations and sends each when it is
     * ready. One failed item does not fail the others.
     * </pre>
     */
    default void batchChat(io.tokenwire.v1.BatchChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.BatchChatResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getBatchChatMethod(), responseObserver);
    }
  }

  /**
   * Base class for the server implementation of the service ChatService.
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public static abstract class ChatServiceImplBase
      implements io.grpc.BindableService, AsyncService {

    @java.lang.Override public final io.grpc.ServerServiceDefinition bindService() {
      return ChatServiceGrpc.bindService(this);
    }
  }

  /**
   * A stub to allow clients to do asynchronous rpc calls to service ChatService.
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public static final class ChatServiceStub
      extends io.grpc.stub.AbstractAsyncStub<ChatServiceStub> {
    private ChatServiceStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ChatServiceStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ChatServiceStub(channel, callOptions);
    }

    /**
     * <pre>
     * Generates a whole answer.
     * </pre>
     */
    public void chat(io.tokenwire.v1.ChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.ChatResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getChatMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Generates an answer and sends it as it grows.
     * Order: one `header`, any number of `delta` (or `snapshot`), one `finish`
     * per choice, one `trailer`. A stream that ends without `trailer` is
     * incomplete and ends with a non-OK status. Ignore events you do not know, and
     * events that are not set: such an empty message keeps a silent stream alive.
     * </pre>
     */
    public void streamChat(io.tokenwire.v1.StreamChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.StreamChatResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getStreamChatMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Generates answers to independent conversations and sends each when it is
     * ready. One failed item does not fail the others.
     * </pre>
     */
    public void batchChat(io.tokenwire.v1.BatchChatRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.BatchChatResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getBatchChatMethod(), getCallOptions()), request, responseObserver);
    }
  }

  /**
   * A stub to allow clients to do synchronous rpc calls to service ChatService.
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public static final class ChatServiceBlockingV2Stub
      extends io.grpc.stub.AbstractBlockingStub<ChatServiceBlockingV2Stub> {
    private ChatServiceBlockingV2Stub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ChatServiceBlockingV2Stub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ChatServiceBlockingV2Stub(channel, callOptions);
    }

    /**
     * <pre>
     * Generates a whole answer.
     * </pre>
     */
    public io.tokenwire.v1.ChatResponse chat(io.tokenwire.v1.ChatRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getChatMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Generates an answer and sends it as it grows.
     * Order: one `header`, any number of `delta` (or `snapshot`), one `finish`
     * per choice, one `trailer`. A stream that ends without `trailer` is
     * incomplete and ends with a non-OK status. Ignore events you do not know, and
     * events that are not set: such an empty message keeps a silent stream alive.
     * </pre>
     */
    @io.grpc.ExperimentalApi("https://github.com/grpc/grpc-java/issues/10918")
    public io.grpc.stub.BlockingClientCall<?, io.tokenwire.v1.StreamChatResponse>
        streamChat(io.tokenwire.v1.StreamChatRequest request) {
      return io.grpc.stub.ClientCalls.blockingV2ServerStreamingCall(
          getChannel(), getStreamChatMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Generates answers to independent conversations and sends each when it is
     * ready. One failed item does not fail the others.
     * </pre>
     */
    @io.grpc.ExperimentalApi("https://github.com/grpc/grpc-java/issues/10918")
    public io.grpc.stub.BlockingClientCall<?, io.tokenwire.v1.BatchChatResponse>
        batchChat(io.tokenwire.v1.BatchChatRequest request) {
      return io.grpc.stub.ClientCalls.blockingV2ServerStreamingCall(
          getChannel(), getBatchChatMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do limited synchronous rpc calls to service ChatService.
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public static final class ChatServiceBlockingStub
      extends io.grpc.stub.AbstractBlockingStub<ChatServiceBlockingStub> {
    private ChatServiceBlockingStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ChatServiceBlockingStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ChatServiceBlockingStub(channel, callOptions);
    }

    /**
     * <pre>
     * Generates a whole answer.
     * </pre>
     */
    public io.tokenwire.v1.ChatResponse chat(io.tokenwire.v1.ChatRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getChatMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Generates an answer and sends it as it grows.
     * Order: one `header`, any number of `delta` (or `snapshot`), one `finish`
     * per choice, one `trailer`. A stream that ends without `trailer` is
     * incomplete and ends with a non-OK status. Ignore events you do not know, and
     * events that are not set: such an empty message keeps a silent stream alive.
     * </pre>
     */
    public java.util.Iterator<io.tokenwire.v1.StreamChatResponse> streamChat(
        io.tokenwire.v1.StreamChatRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getStreamChatMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Generates answers to independent conversations and sends each when it is
     * ready. One failed item does not fail the others.
     * </pre>
     */
    public java.util.Iterator<io.tokenwire.v1.BatchChatResponse> batchChat(
        io.tokenwire.v1.BatchChatRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getBatchChatMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do ListenableFuture-style rpc calls to service ChatService.
   * <pre>
   * Chat with any configured model.
   * Errors are gRPC statuses carrying google.rpc.ErrorInfo (domain `tokenwire`,
   * reason from `ErrorReason`).
   * </pre>
   */
  public static final class ChatServiceFutureStub
      extends io.grpc.stub.AbstractFutureStub<ChatServiceFutureStub> {
    private ChatServiceFutureStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ChatServiceFutureStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ChatServiceFutureStub(channel, callOptions);
    }

    /**
     * <pre>
     * Generates a whole answer.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.tokenwire.v1.ChatResponse> chat(
        io.tokenwire.v1.ChatRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getChatMethod(), getCallOptions()), request);
    }
  }

  private static final int METHODID_CHAT = 0;
  private static final int METHODID_STREAM_CHAT = 1;
  private static final int METHODID_BATCH_CHAT = 2;

  private static final class MethodHandlers<Req, Resp> implements
      io.grpc.stub.ServerCalls.UnaryMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ServerStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ClientStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.BidiStreamingMethod<Req, Resp> {
    private final AsyncService serviceImpl;
    private final int methodId;

    MethodHandlers(AsyncService serviceImpl, int methodId) {
      this.serviceImpl = serviceImpl;
      this.methodId = methodId;
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public void invoke(Req request, io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        case METHODID_CHAT:
          serviceImpl.chat((io.tokenwire.v1.ChatRequest) request,
              (io.grpc.stub.StreamObserver<io.tokenwire.v1.ChatResponse>) responseObserver);
          break;
        case METHODID_STREAM_CHAT:
          serviceImpl.streamChat((io.tokenwire.v1.StreamChatRequest) request,
              (io.grpc.stub.StreamObserver<io.tokenwire.v1.StreamChatResponse>) responseObserver);
          break;
        case METHODID_BATCH_CHAT:
          serviceImpl.batchChat((io.tokenwire.v1.BatchChatRequest) request,
              (io.grpc.stub.StreamObserver<io.tokenwire.v1.BatchChatResponse>) responseObserver);
          break;
        default:
          throw new AssertionError();
      }
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public io.grpc.stub.StreamObserver<Req> invoke(
        io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        default:
          throw new AssertionError();
      }
    }
  }

  public static final io.grpc.ServerServiceDefinition bindService(AsyncService service) {
    return io.grpc.ServerServiceDefinition.builder(getServiceDescriptor())
        .addMethod(
          getChatMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              io.tokenwire.v1.ChatRequest,
              io.tokenwire.v1.ChatResponse>(
                service, METHODID_CHAT)))
        .addMethod(
          getStreamChatMethod(),
          io.grpc.stub.ServerCalls.asyncServerStreamingCall(
            new MethodHandlers<
              io.tokenwire.v1.StreamChatRequest,
              io.tokenwire.v1.StreamChatResponse>(
                service, METHODID_STREAM_CHAT)))
        .addMethod(
          getBatchChatMethod(),
          io.grpc.stub.ServerCalls.asyncServerStreamingCall(
            new MethodHandlers<
              io.tokenwire.v1.BatchChatRequest,
              io.tokenwire.v1.BatchChatResponse>(
                service, METHODID_BATCH_CHAT)))
        .build();
  }

  private static abstract class ChatServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoFileDescriptorSupplier, io.grpc.protobuf.ProtoServiceDescriptorSupplier {
    ChatServiceBaseDescriptorSupplier() {}

    @java.lang.Override
    public com.google.protobuf.Descriptors.FileDescriptor getFileDescriptor() {
      return io.tokenwire.v1.ChatServiceProto.getDescriptor();
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.ServiceDescriptor getServiceDescriptor() {
      return getFileDescriptor().findServiceByName("ChatService");
    }
  }

  private static final class ChatServiceFileDescriptorSupplier
      extends ChatServiceBaseDescriptorSupplier {
    ChatServiceFileDescriptorSupplier() {}
  }

  private static final class ChatServiceMethodDescriptorSupplier
      extends ChatServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoMethodDescriptorSupplier {
    private final java.lang.String methodName;

    ChatServiceMethodDescriptorSupplier(java.lang.String methodName) {
      this.methodName = methodName;
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.MethodDescriptor getMethodDescriptor() {
      return getServiceDescriptor().findMethodByName(methodName);
    }
  }

  private static volatile io.grpc.ServiceDescriptor serviceDescriptor;

  public static io.grpc.ServiceDescriptor getServiceDescriptor() {
    io.grpc.ServiceDescriptor result = serviceDescriptor;
    if (result == null) {
      synchronized (ChatServiceGrpc.class) {
        result = serviceDescriptor;
        if (result == null) {
          serviceDescriptor = result = io.grpc.ServiceDescriptor.newBuilder(SERVICE_NAME)
              .setSchemaDescriptor(new ChatServiceFileDescriptorSupplier())
              .addMethod(getChatMethod())
              .addMethod(getStreamChatMethod())
              .addMethod(getBatchChatMethod())
              .build();
        }
      }
    }
    return result;
  }
}
