{{- /* CEL for organisation policy. */ -}}

{{- /* A list of URIs as a CEL list; {namespace} is the QLoRAJob's. */ -}}
{{- define "qlora-operator.allowed" -}}
{{ toJson . }}.map(uri, uri.replace('{namespace}', object.metadata.namespace))
{{- end -}}

{{- /* Whether a URI is one of those allowed, or below one; no step upwards leads out again. */ -}}
{{- define "qlora-operator.isAmong" -}}
!{{ .value }}.split('/').exists(part, part == '..') && {{ .allowed }}.exists(allowed, {{ .value }} == allowed || {{ .value }}.startsWith(allowed.endsWith('/') ? allowed : allowed + '/'))
{{- end -}}

{{- define "qlora-operator.policyBinding" }}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ .name }}
  labels: {{- include "qlora-operator.labels" .root | nindent 4 }}
spec:
  policyName: {{ .name }}
  validationActions: [{{ .root.Values.policy.action }}]
  {{- with .root.Values.policy.namespaceSelector }}
  matchResources:
    namespaceSelector: {{- toYaml . | nindent 6 }}
  {{- end }}
{{- end -}}
