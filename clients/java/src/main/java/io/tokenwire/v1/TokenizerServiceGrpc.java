package io.tokenwire.v1;

import static io.grpc.MethodDescriptor.generateFullMethodName;

/**
 * <pre>
 * Counts and lists tokens without calling the model.
 * </pre>
 */
@io.grpc.stub.annotations.GrpcGenerated
public final class TokenizerServiceGrpc {

  private TokenizerServiceGrpc() {}

  public static final java.lang.String SERVICE_NAME = "tokenwire.v1.TokenizerService";

  // Static method descriptors that strictly reflect the proto.
  private static volatile io.grpc.MethodDescriptor<io.tokenwire.v1.CountTokensRequest,
      io.tokenwire.v1.CountTokensResponse> getCountTokensMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "CountTokens",
      requestType = io.tokenwire.v1.CountTokensRequest.class,
      responseType = io.tokenwire.v1.CountTokensResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.tokenwire.v1.CountTokensRequest,
      io.tokenwire.v1.CountTokensResponse> getCountTokensMethod() {
    io.grpc.MethodDescriptor<io.tokenwire.v1.CountTokensRequest, io.tokenwire.v1.CountTokensResponse> getCountTokensMethod;
    if ((getCountTokensMethod = TokenizerServiceGrpc.getCountTokensMethod) == null) {
      synchronized (TokenizerServiceGrpc.class) {
        if ((getCountTokensMethod = TokenizerServiceGrpc.getCountTokensMethod) == null) {
          TokenizerServiceGrpc.getCountTokensMethod = getCountTokensMethod =
              io.grpc.MethodDescriptor.<io.tokenwire.v1.CountTokensRequest, io.tokenwire.v1.CountTokensResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "CountTokens"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.CountTokensRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.CountTokensResponse.getDefaultInstance()))
              .setSchemaDescriptor(new TokenizerServiceMethodDescriptorSupplier("CountTokens"))
              .build();
        }
      }
    }
    return getCountTokensMethod;
  }

  private static volatile io.grpc.MethodDescriptor<io.tokenwire.v1.TokenizeRequest,
      io.tokenwire.v1.TokenizeResponse> getTokenizeMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "Tokenize",
      requestType = io.tokenwire.v1.TokenizeRequest.class,
      responseType = io.tokenwire.v1.TokenizeResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<io.tokenwire.v1.TokenizeRequest,
      io.tokenwire.v1.TokenizeResponse> getTokenizeMethod() {
    io.grpc.MethodDescriptor<io.tokenwire.v1.TokenizeRequest, io.tokenwire.v1.TokenizeResponse> getTokenizeMethod;
    if ((getTokenizeMethod = TokenizerServiceGrpc.getTokenizeMethod) == null) {
      synchronized (TokenizerServiceGrpc.class) {
        if ((getTokenizeMethod = TokenizerServiceGrpc.getTokenizeMethod) == null) {
          TokenizerServiceGrpc.getTokenizeMethod = getTokenizeMethod =
              io.grpc.MethodDescriptor.<io.tokenwire.v1.TokenizeRequest, io.tokenwire.v1.TokenizeResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "Tokenize"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.TokenizeRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  io.tokenwire.v1.TokenizeResponse.getDefaultInstance()))
              .setSchemaDescriptor(new TokenizerServiceMethodDescriptorSupplier("Tokenize"))
              .build();
        }
      }
    }
    return getTokenizeMethod;
  }

  /**
   * Creates a new async stub that supports all call types for the service
   */
  public static TokenizerServiceStub newStub(io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceStub>() {
        @java.lang.Override
        public TokenizerServiceStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new TokenizerServiceStub(channel, callOptions);
        }
      };
    return TokenizerServiceStub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports all types of calls on the service
   */
  public static TokenizerServiceBlockingV2Stub newBlockingV2Stub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceBlockingV2Stub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceBlockingV2Stub>() {
        @java.lang.Override
        public TokenizerServiceBlockingV2Stub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new TokenizerServiceBlockingV2Stub(channel, callOptions);
        }
      };
    return TokenizerServiceBlockingV2Stub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports unary and streaming output calls on the service
   */
  public static TokenizerServiceBlockingStub newBlockingStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceBlockingStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceBlockingStub>() {
        @java.lang.Override
        public TokenizerServiceBlockingStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new TokenizerServiceBlockingStub(channel, callOptions);
        }
      };
    return TokenizerServiceBlockingStub.newStub(factory, channel);
  }

  /**
   * Creates a new ListenableFuture-style stub that supports unary calls on the service
   */
  public static TokenizerServiceFutureStub newFutureStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceFutureStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<TokenizerServiceFutureStub>() {
        @java.lang.Override
        public TokenizerServiceFutureStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new TokenizerServiceFutureStub(channel, callOptions);
        }
      };
    return TokenizerServiceFutureStub.newStub(factory, channel);
  }

  /**
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public interface AsyncService {

    /**
     * <pre>
     * Counts tokens.
     * </pre>
     */
    default void countTokens(io.tokenwire.v1.CountTokensRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.CountTokensResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getCountTokensMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lists tokens.
     * </pre>
     */
    default void tokenize(io.tokenwire.v1.TokenizeRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.TokenizeResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getTokenizeMethod(), responseObserver);
    }
  }

  /**
   * Base class for the server implementation of the service TokenizerService.
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public static abstract class TokenizerServiceImplBase
      implements io.grpc.BindableService, AsyncService {

    @java.lang.Override public final io.grpc.ServerServiceDefinition bindService() {
      return TokenizerServiceGrpc.bindService(this);
    }
  }

  /**
   * A stub to allow clients to do asynchronous rpc calls to service TokenizerService.
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public static final class TokenizerServiceStub
      extends io.grpc.stub.AbstractAsyncStub<TokenizerServiceStub> {
    private TokenizerServiceStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected TokenizerServiceStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new TokenizerServiceStub(channel, callOptions);
    }

    /**
     * <pre>
     * Counts tokens.
     * </pre>
     */
    public void countTokens(io.tokenwire.v1.CountTokensRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.CountTokensResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getCountTokensMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lists tokens.
     * </pre>
     */
    public void tokenize(io.tokenwire.v1.TokenizeRequest request,
        io.grpc.stub.StreamObserver<io.tokenwire.v1.TokenizeResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getTokenizeMethod(), getCallOptions()), request, responseObserver);
    }
  }

  /**
   * A stub to allow clients to do synchronous rpc calls to service TokenizerService.
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public static final class TokenizerServiceBlockingV2Stub
      extends io.grpc.stub.AbstractBlockingStub<TokenizerServiceBlockingV2Stub> {
    private TokenizerServiceBlockingV2Stub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected TokenizerServiceBlockingV2Stub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new TokenizerServiceBlockingV2Stub(channel, callOptions);
    }

    /**
     * <pre>
     * Counts tokens.
     * </pre>
     */
    public io.tokenwire.v1.CountTokensResponse countTokens(io.tokenwire.v1.CountTokensRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getCountTokensMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists tokens.
     * </pre>
     */
    public io.tokenwire.v1.TokenizeResponse tokenize(io.tokenwire.v1.TokenizeRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getTokenizeMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do limited synchronous rpc calls to service TokenizerService.
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public static final class TokenizerServiceBlockingStub
      extends io.grpc.stub.AbstractBlockingStub<TokenizerServiceBlockingStub> {
    private TokenizerServiceBlockingStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected TokenizerServiceBlockingStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new TokenizerServiceBlockingStub(channel, callOptions);
    }

    /**
     * <pre>
     * Counts tokens.
     * </pre>
     */
    public io.tokenwire.v1.CountTokensResponse countTokens(io.tokenwire.v1.CountTokensRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getCountTokensMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists tokens.
     * </pre>
     */
    public io.tokenwire.v1.TokenizeResponse tokenize(io.tokenwire.v1.TokenizeRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getTokenizeMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do ListenableFuture-style rpc calls to service TokenizerService.
   * <pre>
   * Counts and lists tokens without calling the model.
   * </pre>
   */
  public static final class TokenizerServiceFutureStub
      extends io.grpc.stub.AbstractFutureStub<TokenizerServiceFutureStub> {
    private TokenizerServiceFutureStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected TokenizerServiceFutureStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new TokenizerServiceFutureStub(channel, callOptions);
    }

    /**
     * <pre>
     * Counts tokens.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.tokenwire.v1.CountTokensResponse> countTokens(
        io.tokenwire.v1.CountTokensRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getCountTokensMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lists tokens.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<io.tokenwire.v1.TokenizeResponse> tokenize(
        io.tokenwire.v1.TokenizeRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getTokenizeMethod(), getCallOptions()), request);
    }
  }

  private static final int METHODID_COUNT_TOKENS = 0;
  private static final int METHODID_TOKENIZE = 1;

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
        case METHODID_COUNT_TOKENS:
          serviceImpl.countTokens((io.tokenwire.v1.CountTokensRequest) request,
              (io.grpc.stub.StreamObserver<io.tokenwire.v1.CountTokensResponse>) responseObserver);
          break;
        case METHODID_TOKENIZE:
          serviceImpl.tokenize((io.tokenwire.v1.TokenizeRequest) request,
              (io.grpc.stub.StreamObserver<io.tokenwire.v1.TokenizeResponse>) responseObserver);
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
          getCountTokensMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              io.tokenwire.v1.CountTokensRequest,
              io.tokenwire.v1.CountTokensResponse>(
                service, METHODID_COUNT_TOKENS)))
        .addMethod(
          getTokenizeMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              io.tokenwire.v1.TokenizeRequest,
              io.tokenwire.v1.TokenizeResponse>(
                service, METHODID_TOKENIZE)))
        .build();
  }

  private static abstract class TokenizerServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoFileDescriptorSupplier, io.grpc.protobuf.ProtoServiceDescriptorSupplier {
    TokenizerServiceBaseDescriptorSupplier() {}

    @java.lang.Override
    public com.google.protobuf.Descriptors.FileDescriptor getFileDescriptor() {
      return io.tokenwire.v1.TokenizerServiceProto.getDescriptor();
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.ServiceDescriptor getServiceDescriptor() {
      return getFileDescriptor().findServiceByName("TokenizerService");
    }
  }

  private static final class TokenizerServiceFileDescriptorSupplier
      extends TokenizerServiceBaseDescriptorSupplier {
    TokenizerServiceFileDescriptorSupplier() {}
  }

  private static final class TokenizerServiceMethodDescriptorSupplier
      extends TokenizerServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoMethodDescriptorSupplier {
    private final java.lang.String methodName;

    TokenizerServiceMethodDescriptorSupplier(java.lang.String methodName) {
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
      synchronized (TokenizerServiceGrpc.class) {
        result = serviceDescriptor;
        if (result == null) {
          serviceDescriptor = result = io.grpc.ServiceDescriptor.newBuilder(SERVICE_NAME)
              .setSchemaDescriptor(new TokenizerServiceFileDescriptorSupplier())
              .addMethod(getCountTokensMethod())
              .addMethod(getTokenizeMethod())
              .build();
        }
      }
    }
    return result;
  }
}
