{{- /* CEL for organization policy. */ -}}

{{- /* A list of URIs as a CEL list; {namespace} is the QLoRAJob's. */ -}}
{{- define "qlora-operator.allowed" -}}
{{ toJson . }}.map(uri, uri.replace('{namespace}', object.metadata.namespace))
{{- end -}}

{{- /* Whether a URI is one of those allowed, or below one; the CRD refuses steps upwards. */ -}}
{{- define "qlora-operator.isAmong" -}}
{{ .allowed }}.exists(allowed, {{ .value }} == allowed || {{ .value }}.startsWith(allowed.endsWith('/') ? allowed : allowed + '/'))
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

{{- /* Policy that refuses the trainer's own image would keep every run from starting. */ -}}
{{- define "qlora-operator.checkImages" -}}
{{- $image := include "qlora-operator.image" (dict "image" .Values.trainerImage "chart" .Chart) -}}
{{- $allowed := false -}}
{{- range .Values.policy.images -}}
{{- if or (eq $image .) (hasPrefix . $image | and (hasSuffix "/" .)) (regexMatch (printf "^%s[/:@]" (regexQuoteMeta .)) $image) -}}
{{- $allowed = true -}}
{{- end -}}
{{- end -}}
{{- if not $allowed -}}
{{- fail (printf "policy.images does not allow %s, the trainer image, so no run could start; add it" $image) -}}
{{- end -}}
{{- end -}}
